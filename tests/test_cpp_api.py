"""include/dijiang/ops.h: a C++ program on LibTorch calls every operator."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from dijiang import _library

PROGRAM = """
#include <torch/types.h>
#include <ATen/ATen.h>
#include <dijiang/ops.h>

using namespace dijiang::ops;

double error(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

int main() {
  auto x = at::randn({2, 3, 16});
  if (error(dct(dct(x), 3), x) > 1e-5) return 1;

  auto q = at::randn({1, 4, 20, 8}), k = at::randn({1, 2, 20, 8});
  auto before = [](const at::Tensor& t) { return t.slice(2, 0, 19); };
  auto last = [](const at::Tensor& t) { return t.slice(2, 19, 20); };
  FeatureParams fq{at::randn({4, 5, 8}), {}, {}}, fk{at::randn({2, 5, 8}), {}, {}};
  auto phi_q = feature_map(q, fq), phi_k = feature_map(k, fk);

  auto [whole, unused] = causal_linear_attention(phi_q, phi_k, k);
  auto [part, state] = causal_linear_attention(before(phi_q), before(phi_k), before(k));
  auto next = causal_linear_attention_update(last(phi_q), last(phi_k), last(k), state);
  if (error(part, before(whole)) > 1e-5 || error(next, last(whole)) > 1e-5) return 2;

  // Without near keys and with scale 1 it is the same function of the same features.
  AttentionOptions options;
  options.scale = 1.0;
  auto [fused, unused_too] = kernelized_attention(q, k, k, fq, fk, options);
  if (error(fused, whole) > 1e-4) return 3;

  // All tokens at once, and how far the last one differs from an update after the others.
  auto attend = [&](const AttentionOptions& options) {
    auto [all, unused] = kernelized_attention(q, k, k, fq, fk, options);
    auto [part, state] = kernelized_attention(before(q), before(k), before(k), fq, fk, options);
    auto next = kernelized_attention_update(last(q), last(k), last(k), state, fq, fk, options);
    return std::make_pair(all, error(next, last(all)));
  };
  options.window = 4;
  options.sinks = 1;
  auto [near, near_error] = attend(options);
  if (near_error > 1e-5 || error(near, whole) < 1e-3) return 4;
  options.cache_size = {3};
  auto [hard, hard_error] = attend(options);
  if (hard_error > 1e-5 || error(hard, near) < 1e-3) return 5;
  return 0;
}
"""


def test_program_runs(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    include = Path(__file__).parents[1] / "include"
    library = _library._FOLDER / "dijiang_ops.so"
    torch_folder = Path(torch.__file__).parent
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    subprocess.run(
        [
            compiler, "-std=c++17", "-O0", f"-I{include}",
            "-isystem", torch_folder / "include",
            "-isystem", torch_folder / "include/torch/csrc/api/include",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            source, "-o", program, f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed",
            library, "-ltorch", "-ltorch_cpu", "-lc10",
            f"-Wl,-rpath,{torch_folder / 'lib'}:{library.parent}",
        ],
        check=True,
    )  # fmt: skip
    assert subprocess.run([program], check=False).returncode == 0
