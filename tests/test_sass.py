"""benchmarks/sass.py on a few lines of machine code, as cuobjdump prints them."""

import os
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "benchmarks/sass.py"

# A loop of four trips: two products, and a power of two on a way around that a rare case takes.
CODE = """
Fatbin elf code:
        Function : other
        /*0000*/                   EXIT ;
        Function : looping
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IMAD.MOV.U32 R0, RZ, RZ, RZ ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/               @P1 BRA 0x60 ;
        /*0040*/                   MUFU.EX2 R16, R16 ;
        /*0050*/                   MUFU.EX2 R17, R17 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0080*/                   ISETP.NE.AND P0, PT, R0, 0x4, PT ;
        /*0090*/               @P0 BRA 0x20 ;
        /*00a0*/                   STG.E [R2], R4 ;
        /*00b0*/                   EXIT ;
"""


def run(tmp_path, *options) -> str:
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{CODE}END\n")
    tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, SCRIPT, "any.o", "looping", "--least", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(text: str, name: str) -> dict[str, int]:
    """The row of the first table that begins so, by column."""
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines()]
    header = next(line for line in lines if len(line) > 2 and line[1] == "all")
    cells = next(line for line in lines if line[0].startswith(name))
    return dict(zip(header[1:], map(int, cells[1:]), strict=True))


def test_main_path_of_a_loop(tmp_path):
    text = run(tmp_path)
    assert "looping" in text and "other" not in text
    assert row(text, "whole kernel")["all"] == 12
    loop = row(text, "loop 0x20, 4 trips")
    assert (loop["HMMA"], loop["MUFU"], loop["all"]) == (2, 0, 6)
    whole = row(text, "main path")
    assert (whole["HMMA"], whole["MUFU"], whole["GLOBAL"]) == (8, 0, 1)


def test_the_way_that_is_asked_for(tmp_path):
    loop = row(run(tmp_path, "--via", "MUFU", "--trips", "0x20=7"), "loop 0x20, 7 trips")
    assert (loop["HMMA"], loop["MUFU"]) == (2, 2)
