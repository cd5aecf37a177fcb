"""Memory is linear in seqlen, and views are read where they lie. Each measurement is a process."""

import json
import subprocess
import sys

import pytest

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]

MEASURE = """
import json, sys
import torch
from dijiang import ops, reference

module, lengths = {"ops": ops, "reference": reference}[sys.argv[1]], json.loads(sys.argv[2])
torch.set_num_threads(1)

def step(seqlen):
    q, k, v = (torch.randn(1, 2, seqlen, 16, requires_grad=True) for _ in range(3))
    params = ops.FeatureParams(torch.randn(2, 16, 16))
    out = module.kernelized_attention(q, k, v, params, params, window=64, sinks=4)
    out.sum().backward()

def peak():  # of the process so far, bytes
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

step(64)
base, peaks = peak(), []
for seqlen in lengths:  # rising, as a peak never falls
    step(seqlen)
    peaks.append(peak() - base)
print(json.dumps(peaks))
"""

EXPANDED = """

import torch
from dijiang import ops

torch.set_num_threads(1)
def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

small = torch.rand(1, 1, 1, 256)
ops.causal_linear_attention(small, small, small[..., :1])
base = peak()
q = small.expand(1, 64, 4096, 256)   # 268 MB if it were copied
k, v = small.expand(1, 8, 4096, 256), small[..., :1].expand(1, 8, 4096, 1)
ops.causal_linear_attention(q, k, v, log_decay=torch.full((8,), -0.1))
print(peak() - base)
"""


def run(program, *args):
    done = subprocess.run(
        [sys.executable, "-c", program, *args], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def growth(peaks):
    """How many times more the last doubling of seqlen costs than the one before: 2 if linear, 4 if
    quadratic. Differences, as what the process held before hides part of every peak."""
    return (peaks[-1] - peaks[-2]) / (peaks[-2] - peaks[-3])


@pytest.fixture(scope="module")
def peaks():
    return run(MEASURE, "ops", json.dumps(LENGTHS))


def test_linear_in_seqlen(peaks):
    assert growth(peaks) < 3
    # Inputs, output and gradients are 7 float32 tensors of 32 numbers a token; doubled for
    # temporaries, this is what one token may cost. 65,536^2 weights would be 34 GB.
    assert peaks[-1] < 2 * 7 * 32 * 4 * LENGTHS[-1]


def test_the_measure_sees_quadratic_memory():
    assert growth(run(MEASURE, "reference", json.dumps([256, 512, 1024]))) > 3


def test_expanded_views_are_not_copied():
    assert run(EXPANDED) < 64e6
