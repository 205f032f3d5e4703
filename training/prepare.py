"""Builds the corpus: functions, and pieces of files, of permissively licensed Python packages, held out by package.

  python3 -m training.prepare --wheels DIR --out DIR [--stdlib DIR] [--held-out NAME,NAME]

Reads wheels and sdists (never runs them) and a standard library. Writes train.jsonl and held_out.jsonl (functions),
train_files.jsonl and held_out_files.jsonl (runs of whole top-level statements), and manifest.json, which says what went in and what
was left out, and why. The same inputs give the same bytes.
"""

import argparse
import ast
import email.parser
import hashlib
import io
import json
import os
import pathlib
import re
import sys
import tarfile
import tokenize
import zipfile

# What may go in. A package whose metadata names anything else, or nothing, stays out.
PERMISSIVE = {
    "mit", "mit-0", "isc", "bsd", "0bsd", "bsd-2-clause", "bsd-3-clause", "apache-2.0", "psf-2.0", "python-2.0",
    "zlib", "unlicense", "hpnd", "mit-cmu",
}
SPELLINGS = [  # (pattern over the lower-cased licence field or classifier, identifier); the first match wins
    (r"lgpl|lesser general|\bgpl|general public|agpl|affero|mozilla|\bmpl|eclipse|\bepl|cddl|eupl", "copyleft"),
    (r"proprietary|commercial|non-?commercial|cc-by-nc", "proprietary"),
    (r"mit no attribution|mit-0", "mit-0"),
    (r"0bsd", "0bsd"),
    (r"2-clause|simplified bsd|\bbsd-2", "bsd-2-clause"),
    (r"3-clause|new bsd|modified bsd|\bbsd-3|revised", "bsd-3-clause"),
    (r"\bbsd", "bsd"),
    (r"apache", "apache-2.0"),
    (r"\bmit\b|expat", "mit"),
    (r"\bisc\b", "isc"),
    (r"python software foundation|\bpsf", "psf-2.0"),
    (r"zlib", "zlib"),
    (r"unlicense", "unlicense"),
    (r"historical permission|hpnd", "hpnd"),
]
EXCLUDED_FOLDERS = {
    "test", "tests", "testing", "_tests", "conftest", "locale", "migrations", "data", "examples", "example", "docs",
    "doc", "benchmarks", "vendor", "_vendor", "vendored", "_vendored", "third_party", "thirdparty", "extern", "externals",
    "_extern", "node_modules", "site-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip", "packages", "pb2",
}
SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}|"
    r"AIza[0-9A-Za-z_-]{30,}|eyJ[A-Za-z0-9_-]{15,}\.[A-Za-z0-9_-]{10,}\.|\bsk-[A-Za-z0-9_-]{20,}|"
    r"(?i:(?:passw(?:or)?d|secret|api_?key|token)\s*[=:]\s*[\"'][^\"'\s]{12,}[\"'])|"
    r"[\"'][0-9a-fA-F]{40,}[\"']|[\"'][A-Za-z0-9+/]{60,}={0,2}[\"']|"
    r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+\.[A-Za-z]{2,}")
FUNCTION_LINES_MAX = 24
FUNCTION_BYTES_MAX = 900
DOCSTRING_LINES_MAX = 3
PIECE_BYTES_MAX = 1500


def licence_of(metadata):
    """The identifiers that a package's metadata names, and whether every one of them is permissive."""
    fields = [metadata.get("License-Expression") or ""]
    classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    if not fields[0]:
        fields = [c.rsplit("::", 1)[1] for c in classifiers if not c.endswith("OSI Approved")]
    if not fields:
        # Only a short field is a name; a long one is a text that may quote other licences.
        fields = [(metadata.get("License") or "").strip().split("\n")[0][:80]]
    found = []
    for field in fields:
        # "A OR B" lets us choose, "A AND B" does not: a choice is made only where every part is known.
        for part in re.split(r"\s+(?:or|and|with)\s+|[,;/()]", field.lower()):
            if not part.strip():
                continue
            found.append(next((name for pattern, name in SPELLINGS if re.search(pattern, part)), "unknown"))
    return sorted(set(found)), bool(found) and all(name in PERMISSIVE for name in found)


def archive_files(path):
    """(name in the archive, text or None) of a wheel or an sdist, in the order of their names."""
    if path.suffix == ".whl" or path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith((".py", "/METADATA", "/PKG-INFO")):
                    yield name, archive.read(name)
    else:
        with tarfile.open(path) as archive:
            members = {m.name: m for m in archive.getmembers() if m.isfile()}
            for name in sorted(members):
                if name.endswith(".py") or (name.endswith("/PKG-INFO") and name.count("/") == 1):
                    yield name.split("/", 1)[-1], archive.extractfile(members[name]).read()


def excluded(name):
    parts = name.lower().split("/")
    base = parts[-1]
    return (any(part in EXCLUDED_FOLDERS for part in parts[:-1]) or base.startswith("test_") or
            base.endswith(("_test.py", "_pb2.py")) or base in ("conftest.py", "setup.py", "tests.py"))


def normalised(text):
    return hashlib.sha256(re.sub(r"\s+", " ", text).strip().encode()).hexdigest()


def dedented(lines):
    indent = len(lines[0]) - len(lines[0].lstrip(" "))
    if any(line.strip() and not line.startswith(" " * indent) for line in lines):
        return None  # a string that reaches to the margin
    return "\n".join(line[indent:].rstrip() for line in lines)


def shorten_docstring(lines, node):
    """The docstring's first paragraph alone, closed on its last line or right behind it."""
    first = node.body[0]
    if not (isinstance(first, ast.Expr) and isinstance(getattr(first, "value", None), ast.Constant) and
            isinstance(first.value.value, str)):
        return lines
    begin, end = first.lineno - node.lineno, first.end_lineno - node.lineno
    text = lines[begin:end + 1]
    if len(text) == 1:
        return lines
    quote = '"""' if '"""' in text[0] else "'''"
    if quote not in text[0]:
        return lines
    opened = text[0].split(quote, 1)[1].strip()
    kept = [text[0].rstrip()]
    for line in text[1:]:
        if not line.strip() or line.strip() == quote:
            if opened or len(kept) > 1:
                break
            continue
        kept.append(line.rstrip())
        if len(kept) > DOCSTRING_LINES_MAX:
            return None
    last = kept[-1]
    if not last.endswith(quote) or last.strip() == quote:
        kept[-1] = last.split(quote)[0].rstrip() + quote if len(kept) > 1 and quote in last else last + quote
    return lines[:begin] + kept + lines[end + 1:]


def local_names(tree, text):
    """{name: [(begin, end)]}: parameters and assigned names of the function, wherever they are in the text."""
    function = tree.body[0]
    arguments = function.args
    names = {a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs}
    names |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a}
    declared = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            declared |= set(node.names)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    names -= {"self", "cls", "_"} | declared
    if not names:
        return {}
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    where = {}
    previous = ""
    depth_call = []  # for "f(name=...)": a keyword belongs to the callee
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for index, token in enumerate(tokens):
        if token.string in "([{" and token.type == tokenize.OP:
            depth_call.append(token.string == "(" and index and tokens[index - 1].type == tokenize.NAME)
        elif token.string in ")]}" and token.type == tokenize.OP and depth_call:
            depth_call.pop()
        if token.type == tokenize.NAME and token.string in names and previous != ".":
            after = tokens[index + 1].string if index + 1 < len(tokens) else ""
            keyword = after == "=" and depth_call and depth_call[-1] and token.start[0] > function.body[0].lineno - 1
            if not keyword:
                begin = starts[token.start[0] - 1] + token.start[1]
                where.setdefault(token.string, []).append((begin, begin + len(token.string)))
        previous = token.string
    if ast.get_docstring(function):
        first = function.body[0]
        begin = starts[first.lineno - 1]
        end = starts[first.end_lineno - 1] + first.end_col_offset
        for name in names:
            if len(name) > 2:
                for match in re.finditer(r"(?<![A-Za-z0-9_])" + re.escape(name) + r"(?![A-Za-z0-9_])", text[begin:end]):
                    where.setdefault(name, []).append((begin + match.start(), begin + match.end()))
    return {name: sorted(spans) for name, spans in sorted(where.items()) if len(spans) > 1}


def functions_of(source):
    """Samples of one file: functions that stand alone, methods dedented, docstrings cut to a paragraph."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = source.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = shorten_docstring(lines[node.lineno - 1:node.end_lineno], node)
        if body is None or not 2 <= len(body) <= FUNCTION_LINES_MAX:
            continue
        text = dedented(body)
        if (text is None or len(text) > FUNCTION_BYTES_MAX or not text.isascii() or "\t" in text or "\n\n\n" in text or
                max(len(line) for line in body) > 120):
            continue
        try:
            alone = ast.parse(text)
            function = alone.body[0]
            names = local_names(alone, text)
        except (SyntaxError, tokenize.TokenError, ValueError, IndexError):
            continue
        if len(alone.body) != 1:
            continue
        docstring = ast.get_docstring(function) is not None
        starts = [0]
        for line in text.split("\n"):
            starts.append(starts[-1] + len(line) + 1)
        if docstring and len(function.body) == 1:
            continue  # nothing but words
        first = function.body[1 if docstring else 0]
        body_begin = starts[first.lineno - 1] - 1  # at the newline in front of the body
        if getattr(first, "decorator_list", None) or body_begin <= 0 or first.lineno == 1:
            continue
        yield {"text": text, "body": body_begin, "doc": docstring, "names": names}


def pieces_of(source):
    """File-level samples: runs of whole top-level statements, comments and all, that belong next to each other in the file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = source.split("\n")
    ends = [node.end_lineno for node in tree.body]
    begin = 0
    for index, end in enumerate(ends):
        # What stands between two statements (comments, blank lines) belongs to the one that follows.
        following = ends[index + 1] if index + 1 < len(ends) else None
        length = sum(len(line) + 1 for line in lines[begin:following or end])
        if following is not None and length <= PIECE_BYTES_MAX:
            continue
        text = "\n".join(line.rstrip() for line in lines[begin:end]).strip("\n")
        if (text.count("\n") >= 2 and len(text) <= PIECE_BYTES_MAX and text.isascii() and "\t" not in text and
                max(len(line) for line in text.split("\n")) <= 120):
            yield {"text": text, "body": text.index("\n"), "names": {}}
        begin = end


def function_digest(text):
    """Of what a function does, whatever its docstring says."""
    return normalised(re.sub(r'"""[\s\S]*?"""', "", text))


def sources(options):
    """(package, version, licences or None, [(name, bytes)]) of every input, in a fixed order."""
    for path in sorted(pathlib.Path(options.wheels).iterdir()):
        if not path.name.endswith((".whl", ".zip", ".tar.gz", ".tgz")):
            continue
        files = list(archive_files(path))
        raw = [data for name, data in files if name.endswith(("/METADATA", "/PKG-INFO")) or name == "PKG-INFO"]
        metadata = email.parser.Parser().parsestr(raw[0].decode("utf-8", "replace") if raw else "")
        package = (metadata.get("Name") or path.name.split("-")[0]).lower()
        yield package, metadata.get("Version") or "", licence_of(metadata), files
    if options.stdlib:
        root = pathlib.Path(options.stdlib)
        version = ".".join(map(str, sys.version_info[:3])) if root == pathlib.Path(os.__file__).parent else root.name
        files = [(str(path.relative_to(root)), path.read_bytes()) for path in sorted(root.rglob("*.py"))
                 if not path.is_symlink()]
        yield "python-stdlib", version, (["psf-2.0"], True), files


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", required=True, help="folder of wheels and sdists")
    parser.add_argument("--stdlib", help="folder of a Python standard library")
    parser.add_argument("--out", required=True)
    parser.add_argument("--held-out", default="", help="packages, comma-separated, that are never trained on")
    parser.add_argument("--package-max", type=int, default=9000, help="functions kept of one package")
    options = parser.parse_args(argv)
    held_out = {name.strip().lower() for name in options.held_out.split(",") if name.strip()}
    seen_files, held, train, packages = set(), [], [], []
    dropped = {"licence": 0, "excluded_path": 0, "duplicate_file": 0, "duplicate_function": 0, "secret": 0,
               "duplicate_piece": 0, "not_utf8": 0, "also_held_out": 0, "over_package_max": 0}
    for package, version, (licences, permissive), files in sources(options):
        record = {"package": package, "version": version, "licences": licences, "files": 0, "bytes": 0, "functions": 0,
                  "used": permissive, "split": "held_out" if package in held_out else "train"}
        packages.append(record)
        if not permissive:
            dropped["licence"] += 1
            continue
        samples, pieces = [], []
        for name, data in files:
            if not name.endswith(".py"):
                continue
            if excluded(name):
                dropped["excluded_path"] += 1
                continue
            try:
                source = data.decode("utf-8").replace("\r\n", "\n").expandtabs(8)
            except UnicodeDecodeError:
                dropped["not_utf8"] += 1
                continue
            # A file may name a licence of its own.
            head = source[:3000].lower()
            if re.search(r"general public licen[sc]e|\bl?gpl(?:v?[23]|-[23])|mozilla public", head):
                dropped["licence"] += 1
                continue
            digest = normalised(source)
            if digest in seen_files:
                dropped["duplicate_file"] += 1
                continue
            seen_files.add(digest)
            record["files"] += 1
            record["bytes"] += len(data)
            for sample in functions_of(source):
                if SECRETS.search(sample["text"]):
                    dropped["secret"] += 1
                    continue
                sample["package"] = package
                samples.append(sample)
            for piece in pieces_of(source):
                if SECRETS.search(piece["text"]):
                    dropped["secret"] += 1
                else:
                    pieces.append(dict(piece, package=package))
        (held if package in held_out else train).append((record, samples, pieces))
    seen = set()
    written = {}
    # Held-out functions are settled first; whatever equals one of them leaves the training side.
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, groups in (("held_out", held), ("train", train)):
        with open(out / (name + ".jsonl"), "w", encoding="utf-8") as file:
            count = size = 0
            for record, samples, _ in groups:
                for sample in samples:
                    digest = function_digest(sample["text"])
                    if digest in seen:
                        dropped["duplicate_function" if name == "held_out" else "also_held_out"
                                if (digest, "held") in seen else "duplicate_function"] += 1
                        continue
                    if record["functions"] >= options.package_max and record["package"] != "python-stdlib":
                        dropped["over_package_max"] += 1
                        continue
                    seen.add(digest)
                    if name == "held_out":
                        seen.add((digest, "held"))
                    record["functions"] += 1
                    count, size = count + 1, size + len(sample["text"])
                    file.write(json.dumps(sample) + "\n")
            written[name] = {"functions": count, "bytes": size}
    # The same for pieces of files.
    for name, groups in (("held_out_files", held), ("train_files", train)):
        with open(out / (name + ".jsonl"), "w", encoding="utf-8") as file:
            count = size = 0
            for record, _, pieces in groups:
                for piece in pieces[:options.package_max]:
                    digest = normalised(piece["text"])
                    if digest in seen:
                        dropped["duplicate_piece"] += 1
                        continue
                    if name == "train_files" and any((function_digest(function["text"]), "held") in seen
                                                     for function in functions_of(piece["text"])):
                        dropped["also_held_out"] += 1
                        continue
                    seen.add(digest)
                    count, size = count + 1, size + len(piece["text"])
                    file.write(json.dumps(piece) + "\n")
            written[name] = {"pieces": count, "bytes": size}
    licences = {}
    for record in packages:
        if record["used"]:
            key = " AND ".join(record["licences"])
            licences[key] = licences.get(key, 0) + record["bytes"]
    manifest = {"packages": packages, "dropped": dropped, "written": written, "bytes_by_licence": licences}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(json.dumps({"written": written, "dropped": dropped, "bytes_by_licence": licences}, indent=1))


if __name__ == "__main__":
    main()
