#!/usr/bin/env python3
"""What is proven of each family, from the cases themselves: the table of README.md.

    tests/golden/support_table.py            prints it
    tests/golden/support_table.py --check    fails unless README.md has it between its two markers
    tests/golden/support_table.py --write    puts it there

A family counts with a container where its logits from such a file are compared with the float64 reference; with a sampler
where tokens, or the properties of random runs, are; with CUDA where tests/unit/kernels/cuda_model_test.cc runs it.
Standard library alone.
"""
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BEGIN, END = "<!-- tests/golden/support_table.py -->\n", "<!-- end -->\n"
GGUF_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "mixed": "Q8_0 Q4_0 Q4_1", "k": "Q4_K Q6_K"}
FAMILIES = ["a2d", "bd3lm", "diffusion_gemma", "dream", "fast_dllm_v2", "llada", "llada_moe", "llada2", "mdlm", "open_dcoder",
            "rnd1", "sdar", "sdar_moe", "sedd"]


def family_of(model):
    name = model.removesuffix(".gguf")
    return max((f for f in FAMILIES if name == f or name.startswith(f + "_")), key=len)


def types_in(model):
    """Element types of the matrices of a golden checkpoint."""
    if model.endswith(".gguf"):
        return GGUF_TYPES[model.removesuffix(".gguf").rsplit("_", 1)[1]].split()
    types = set()
    for path in (HERE / "models" / model).glob("*.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
        types |= {t["dtype"] for n, t in header.items() if n != "__metadata__" and len(t["shape"]) > 1}
    return sorted(types)


def add(into, family, values):
    known = into.setdefault(family, [])
    known.extend(v for v in values if v not in known)


def table():
    index = json.loads((HERE / "index.json").read_text())
    safetensors, gguf, exact, drawn = {}, {}, {}, {}
    for entry in index["logits"]:
        model = entry["model_dir"].split("/")[1]
        add(gguf if model.endswith(".gguf") else safetensors, family_of(model), types_in(model))
    for kind, into in (("tokens", exact), ("properties", drawn)):
        for entry in index[kind]:
            case = json.loads((HERE / entry["case_file"]).read_text())
            add(into, family_of(case["model"].split("/")[1]), [case["options"]["sampler"]])
    # That test walks the folders of models/, as this does.
    walks = "GoldenModels()" in (ROOT / "tests/unit/kernels/cuda_model_test.cc").read_text()
    emulated = {family_of(p.name) for p in (HERE / "models").iterdir() if walks and p.is_dir()}
    lines = ["| family | safetensors | GGUF | exact tokens | random, by properties | CPU | CUDA |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for family in FAMILIES:
        cuda = "emulated" if family in emulated else "not tried"
        random = [s for s in drawn.get(family, []) if s not in exact.get(family, [])]
        lines.append("| %s | %s | %s | %s | %s | exact | %s |" % (
            family, " ".join(safetensors.get(family, [])), " ".join(gguf.get(family, [])) or "no such architecture",
            ", ".join(sorted(exact.get(family, []))), ", ".join(sorted(random)), cuda))
    return "\n".join(lines) + "\n"


def main():
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    if sys.argv[1:] == ["--write"]:
        readme.write_text(before + BEGIN + table() + END + after)
    elif sys.argv[1:] == ["--check"]:
        if old != table():
            sys.exit("README.md: its table of families is not what tests/golden proves; run tests/golden/support_table.py --write")
        print("README.md has the table")
    elif not sys.argv[1:]:
        print(table(), end="")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
