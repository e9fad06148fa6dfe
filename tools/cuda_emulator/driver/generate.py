#!/usr/bin/env python3
"""Registers a .cu file's kernels: writes a C++ file that includes the source
and adds each `extern "C" __global__` function of it under its name.

usage: generate.py ours|foreign SOURCE.cu OUT.cpp -- COMPILER OPTIONS...
The compiler with its options preprocesses the source to find the names, since
macros make many of them.
"""
import pathlib
import re
import subprocess
import sys

# Foreign sources are included in an unnamed namespace and lose their linkage:
# the helpers that each of them brings would collide, and names of kernels may
# be ours too. So what they include comes before it.
FOREIGN = """#include "foreign.h"
#include <stdint.h>
#include <cmath>
#include <limits>
#include "{here}/kernel.h"
namespace {{
#include "{source}"
}}
"""
OURS = """#include "{source}"
#include "{here}/kernel.h"
"""
ADDED = """
namespace {{
struct Added {{
    Added() {{
{calls}
    }}
}} added;
}}
"""


def adapted(text):
    """`extern __shared__ T name[]` asks the emulator for the block's memory; kernels are internal."""
    text = re.sub(r"extern\s+__shared__\s+([\w ]+?)\s+(\w+)\[\];", r"\1* \2 = emulator::dynamic_shared<\1>();", text)
    return re.sub(r'extern\s+"C"\s+__global__', "__global__", text)


def adapted_folder(source, out):
    """A folder with `source` and the headers beside it, adapted."""
    folder = out.parent / "foreign"
    folder.mkdir(exist_ok=True)
    for path in [source, *source.parent.glob("*.cuh")]:
        copy, text = folder / path.name, adapted(path.read_text())
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
    return folder


def with_bounds(here, out):
    """A folder whose emulator.h leaves __launch_bounds__ in the text as BOUNDS."""
    folder = out.with_name("bounds")
    folder.mkdir(exist_ok=True)
    text = (here.parent / "emulator.h").read_text()
    kept = text.replace("#define __launch_bounds__(...)", "#define __launch_bounds__(...) BOUNDS(__VA_ARGS__)")
    if kept == text:
        sys.exit("emulator.h has another __launch_bounds__ than expected")
    (folder / "emulator.h").write_text(kept)
    return folder


def kernels(compiler, path, folder):
    """Names of the kernels defined in the files of `folder` that `path` includes, each with
    the most threads that its launch bounds allow a block, an expression (0: no bound)."""
    command = [*compiler, "-E", str(path)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    own, kept = False, []
    for line in lines.splitlines():
        marker = re.match(r'# \d+ "(.*?)"', line)
        if marker:
            own = pathlib.Path(marker[1]).parent == folder
        elif own:
            kept.append(line)
    found = re.findall(r'extern\s+"C"\s+void\s+(?:BOUNDS\(([^()]*)\)\s*)?(\w+)\s*\(', "\n".join(kept))
    return [(name, bounds.split(",")[0].strip() or "0") for bounds, name in found]


def main():
    kind, source, out = sys.argv[1], pathlib.Path(sys.argv[2]).resolve(), pathlib.Path(sys.argv[3]).resolve()
    compiler = sys.argv[sys.argv.index("--") + 1 :]
    here = pathlib.Path(__file__).resolve().parent
    frame = FOREIGN if kind == "foreign" else OURS
    out.write_text(frame.format(here=here, source=source))
    bounds = with_bounds(here, out)
    names = kernels([compiler[0], "-I", str(bounds), *compiler[1:]], out, source.parent)
    if not names:
        sys.exit(f"{source}: no kernels found")
    foreign = "true" if kind == "foreign" else "false"
    if kind == "foreign":
        source = adapted_folder(source, out) / source.name
    calls = "\n".join(
        f'        driver::add(driver::Entry<&{name}>::named<{foreign}>("{name}", {most}));' for name, most in names
    )
    out.write_text(frame.format(here=here, source=source) + ADDED.format(calls=calls))


main()
