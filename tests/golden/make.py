#!/usr/bin/env python3
"""Regenerates everything under tests/golden that is not code: checkpoints, logits, cases, index.json.

    python3 tests/golden/make.py            writes models/, logits/, cases/, probabilities/, index.json
    python3 tests/golden/make.py --check    builds into a temporary folder and compares with what is committed

Needs Python 3.9 and numpy, nothing else. Deterministic: on one machine the bytes are the same each time; on
another the last bit of a float may differ, which --check allows (1e-9 in JSON, one float32 step in logits).
"""
import argparse
import json
import math
import pathlib
import shutil
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402

from reference import cases, checkpoints, gguf_models, models, safetensors_io, tokenizer  # noqa: E402

GENERATED = ["models", "logits", "cases", "probabilities", "index.json"]

# Ids below these stand for text; the others are special or unused rows.
TEXT_IDS = {"llada_gqa": 125, "sdar_b8": 93, "sdar_moe": 93, "rnd1": 93, "rnd1_bf16": 93, "llada_moe": 93, "llada2": 93,
            "llada2_indel": 93, "fast_dllm_v2": 93, "bd3lm": 88, "diffusion_gemma": 97, "diffusion_gemma_bf16": 97,
            "sedd_absorb": 83, "sedd_uniform": 83, "mdlm": 88, "dream_mixed": 93, "rnd1_mixed": 93, "llada_moe_mixed": 93,
            "llada_k": 93}


def text_ids(model_name):
    return TEXT_IDS.get(model_name, tokenizer.FIRST_ADDED_ID)


def dump_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")).replace('],"', '],\n"') + "\n", encoding="utf-8")


def make_checkpoints(out):
    for name, write in checkpoints.CHECKPOINTS.items():
        write(out / "models" / name)
        written = sum(f.stat().st_size for f in (out / "models" / name).iterdir())
        assert written < 160 << 10, f"{name}: {written} bytes"
    gguf_models.make(out / "models")


def logits_inputs(model_name, traits):
    """Two inputs of odd length, partly masked (none masked when there is no mask token)."""
    seed = sum(model_name.encode())
    for length, masked_share, sigma in ((13, 0.5, 0.3), (37, 0.6, 2.25)):
        random = np.random.RandomState(seed + length)
        ids = random.randint(0, text_ids(model_name), length)
        given = random.random_sample(length) >= masked_share
        if traits.family == "diffusion_gemma":
            given[:] = np.arange(length) < length - 8  # a block of noise behind what is encoded
        elif traits.mask_token < 0:
            given[:] = True
        if traits.mask_token >= 0:
            ids[~given] = traits.mask_token
        entry = {"ids": ids.tolist(), "given": given.tolist()}
        if traits.family == "sedd":
            entry["sigma"] = sigma
        yield length, entry


def make_logits(out):
    """Rows as the network gives them. Rounded checkpoints: the float64 result on the rounded weights."""
    index = []
    folder = out / "models"
    networks = [(name, name, models.load(folder / name), models.load(folder / name, np.float32))
                for name in checkpoints.CHECKPOINTS]
    networks += [(name, f"{name}.gguf", gguf_models.loaded(folder, name), gguf_models.loaded(folder, name, np.float32))
                 for name in gguf_models.FILES]
    for name, place, model, narrow in networks:
        for length, entry in logits_inputs(name, model.traits):
            shortened = ("dream_bf16", "sdar_b4_f16", "rnd1_bf16", "diffusion_gemma_bf16")
            if (name in shortened or place.endswith(".gguf")) and length != 13:
                continue
            case = f"{name}_{length}" if place == name else f"{name}_gguf_{length}"
            if model.traits.family == "diffusion_gemma":
                index.append(make_steps(out, name, case, entry, model, narrow))
                continue
            rows = model.logits(entry["ids"], entry.get("sigma"))
            # The reference itself must not be badly conditioned: float32 stays well inside the bound that
            # run_cli.py grants.
            error = np.abs(narrow.logits(entry["ids"], entry.get("sigma")) - rows) / np.maximum(1, np.abs(rows))
            assert error.max() < 1e-4, f"{case}: float32 is off by {error.max():.1e}"
            dump_json(out / "logits" / f"{case}.json", entry)
            safetensors_io.save(out / "logits" / f"{case}.safetensors", {"logits": rows}, "F32")
            index.append({"name": case, "model_dir": f"models/{place}", "input_file": f"logits/{case}.json",
                          "logits_file": f"logits/{case}.safetensors",
                          "bound": 1e-2 if name in gguf_models.QUANTIZED else 2e-4})
    return index


def make_steps(out, name, case, entry, model, narrow):
    """Three steps of one block, each conditioned on the prediction of the one before; `ids` holds the first."""
    begin = entry["given"].index(False)
    random = np.random.RandomState(begin)
    entry["steps"] = [{"ids": entry["ids"][begin:], "temperature": 0.8}]
    entry["steps"] += [{"ids": random.randint(0, 97, 8).tolist(), "temperature": t} for t in (0.55, 0.4)]
    rows, before, narrow_before = [], None, None
    for step in entry["steps"]:
        logits = model.block_logits(entry["ids"][:begin], step["ids"], before)
        single = narrow.block_logits(entry["ids"][:begin], step["ids"], narrow_before)
        error = np.abs(single - logits) / np.maximum(1, np.abs(logits))
        assert error.max() < 7e-5, f"{case}: float32 is off by {error.max():.1e}"
        before = logits, step["temperature"]
        narrow_before = single.astype(np.float32), np.float32(step["temperature"])
        rows.append(logits)
    dump_json(out / "logits" / f"{case}.json", entry)
    safetensors_io.save(out / "logits" / f"{case}.safetensors", {"logits": rows[0], "steps": np.concatenate(rows)},
                        "F32")
    return {"name": case, "model_dir": f"models/{name}", "input_file": f"logits/{case}.json",
            "logits_file": f"logits/{case}.safetensors", "bound": 2e-4}


def make(out):
    out.mkdir(parents=True, exist_ok=True)
    for name in GENERATED:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    make_checkpoints(out)
    index = {"logits": make_logits(out), "tokens": [], "properties": [], "probabilities": []}
    loaded = {name: models.load(out / "models" / name) for name in checkpoints.CHECKPOINTS}
    for name, case in cases.token_cases(loaded, text_ids):
        dump_json(out / "cases" / f"{name}.json", case)
        index["tokens"].append({"name": name, "case_file": f"cases/{name}.json"})
    for name, case in cases.gemma_cases(loaded):
        dump_json(out / "cases" / f"{name}.json", case)
        index["tokens"].append({"name": name, "case_file": f"cases/{name}.json"})
    for name, case in cases.random_run_cases(loaded, text_ids):
        dump_json(out / "cases" / f"random_run_{name}.json", case)
        index["properties"].append({"name": name, "case_file": f"cases/random_run_{name}.json"})
    for name, case in cases.probability_cases(loaded, text_ids):
        dump_json(out / "probabilities" / f"{name}.json", case)
        index["probabilities"].append({"name": name, "case_file": f"probabilities/{name}.json"})
    (out / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index


# --- comparison ------------------------------------------------------------------------------------------

def json_difference(a, b, where=""):
    """First difference of two JSON values, or None. Floats may differ by 1e-9, everything else not at all."""
    if isinstance(a, float) and isinstance(b, float):
        return None if a == b or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) else f"{where}: {a} / {b}"
    if type(a) is not type(b):
        return f"{where}: {a} / {b}"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{where}: keys {list(a)} / {list(b)}"
        pairs = [(f"{where}.{key}", a[key], b[key]) for key in a]
    elif isinstance(a, list):
        if len(a) != len(b):
            return f"{where}: length {len(a)} / {len(b)}"
        pairs = [(f"{where}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b))]
    else:
        return None if a == b else f"{where}: {a} / {b}"
    return next((d for d in (json_difference(x, y, w) for w, x, y in pairs) if d), None)


def file_difference(committed, made):
    if committed.suffix == ".json":
        return json_difference(json.loads(committed.read_text()), json.loads(made.read_text()))
    if committed.parent.name == "logits":
        a, b = safetensors_io.load(committed)["logits"], safetensors_io.load(made)["logits"]
        if a.shape != b.shape:
            return f"shape {a.shape} / {b.shape}"
        worst = np.max(np.abs(a - b) / np.maximum(1e-2, np.abs(a)))
        return None if worst < 2.5e-7 else f"relative difference {worst:.1e}"
    return None if committed.read_bytes() == made.read_bytes() else "bytes differ"


def files_under(folder):
    roots = [folder / name for name in GENERATED]
    return {p.relative_to(folder) for r in roots for p in ([r] if r.is_file() else r.rglob("*")) if p.is_file()}


def check():
    with tempfile.TemporaryDirectory() as temporary:
        made = pathlib.Path(temporary)
        make(made)
        failures = [f"{name}: only on one side" for name in sorted(files_under(HERE) ^ files_under(made))]
        for name in sorted(files_under(HERE) & files_under(made)):
            difference = file_difference(HERE / name, made / name)
            if difference:
                failures.append(f"{name}: {difference}")
        for line in failures:
            print("FAIL", line)
        print(f"{len(files_under(made))} files compared, {len(failures)} differ")
        return 1 if failures else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed files, change nothing")
    args = parser.parse_args()
    if args.check:
        return check()
    index = make(HERE)
    size = sum((HERE / name).stat().st_size for name in files_under(HERE))
    print(", ".join(f"{len(index[kind])} {kind}" for kind in index), f"- {size / 2**20:.2f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
