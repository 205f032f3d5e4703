"""The data pipeline: licences, held-out packages, duplicates, secrets, names. Needs only Python."""

import ast
import email.message
import json
import pathlib
import random
import sys
import tempfile
import unittest
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from training import prepare, synthetic  # noqa: E402

ADD = "def add(first, second):\n    total = first + second\n    return total\n"
SECRET = 'def login():\n    key = "AKIAABCDEFGHIJKLMNOP"\n    return key\n'


def wheel(folder, name, licence, files):
    with zipfile.ZipFile(pathlib.Path(folder) / (name + "-1.0-py3-none-any.whl"), "w") as archive:
        archive.writestr(name + "-1.0.dist-info/METADATA", "Name: %s\nVersion: 1.0\nLicense: %s\n" % (name, licence))
        for path, text in files.items():
            archive.writestr(path, text)


def metadata(**fields):
    message = email.message.Message()
    for name, value in fields.items():
        message[name.replace("_", "-")] = value
    return message


class PrepareTest(unittest.TestCase):
    def prepared(self, fill, held_out=""):
        with tempfile.TemporaryDirectory() as folder:
            wheels, out = pathlib.Path(folder) / "wheels", pathlib.Path(folder) / "out"
            wheels.mkdir()
            fill(wheels)
            prepare.main(["--wheels", str(wheels), "--out", str(out), "--held-out", held_out])
            read = lambda name: [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]
            self.train_pieces, self.held_out_pieces = read("train_files.jsonl"), read("held_out_files.jsonl")
            return read("train.jsonl"), read("held_out.jsonl"), json.loads((out / "manifest.json").read_text())

    def test_only_permissive_licences_are_taken(self):
        for licence, taken in (("MIT", True), ("BSD-3-Clause", True), ("Apache Software License", True), ("GPLv3", False),
                               ("LGPL-2.1", False), ("MPL-2.0", False), ("", False), ("Somebody's own", False)):
            self.assertEqual(prepare.licence_of(metadata(License=licence))[1], taken, licence)
        self.assertFalse(prepare.licence_of(metadata(License_Expression="MIT AND GPL-3.0-only"))[1])

    def test_a_package_of_another_licence_stays_out(self):
        def fill(wheels):
            wheel(wheels, "free", "MIT", {"free/a.py": ADD})
            wheel(wheels, "left", "GPLv3", {"left/a.py": ADD.replace("add", "plus").replace("first", "one")})
        train, _, manifest = self.prepared(fill)
        self.assertEqual([sample["package"] for sample in train], ["free"])
        self.assertEqual(manifest["dropped"]["licence"], 1)

    def test_vendored_code_tests_and_secrets_stay_out(self):
        other = ADD.replace("total", "result")
        def fill(wheels):
            wheel(wheels, "free", "MIT", {"free/_vendor/x.py": ADD, "free/tests/test_x.py": other, "free/login.py": SECRET})
        train, _, manifest = self.prepared(fill)
        self.assertEqual(train, [])
        self.assertEqual(manifest["dropped"]["excluded_path"], 2)
        self.assertEqual(manifest["dropped"]["secret"], 2)  # as a function, and as a piece of its file

    def test_nothing_held_out_is_trained_on(self):
        def fill(wheels):
            # Another file, the same function.
            wheel(wheels, "aside", "MIT", {"aside/a.py": ADD})
            wheel(wheels, "free", "MIT", {"free/a.py": "import os\n\n\n" + ADD, "free/b.py": ADD.replace("add", "plus")})
        train, held_out, _ = self.prepared(fill, held_out="aside")
        self.assertEqual([sample["package"] for sample in held_out], ["aside"])
        self.assertFalse({s["text"] for s in train} & {s["text"] for s in held_out})
        self.assertEqual(len(train), 1)

    def test_pieces_of_files_are_whole_statements_with_their_comments(self):
        source = "import os\n\n# How many.\nCOUNT = 3\n\n\n" + ADD + "\n\n# Twice.\n" + ADD.replace("add", "twice")
        piece, = prepare.pieces_of(source)
        self.assertEqual(piece["text"], source.rstrip("\n"))
        long = "\n".join("VALUE_%d = %d  # %s" % (i, i, "x" * 60) for i in range(60)) + "\n"
        pieces = list(prepare.pieces_of(long))
        self.assertGreater(len(pieces), 2)
        self.assertEqual("\n".join(piece["text"] for piece in pieces) + "\n", long)
        for piece in pieces:
            ast.parse(piece["text"])
            self.assertLessEqual(len(piece["text"]), prepare.PIECE_BYTES_MAX)
        self.assertEqual(list(prepare.pieces_of("def f(:\n")), [])

    def test_a_piece_with_a_held_out_function_is_not_trained_on(self):
        def fill(wheels):
            wheel(wheels, "aside", "MIT", {"aside/a.py": "import sys\n\n" + ADD})
            wheel(wheels, "free", "MIT", {"free/a.py": "import os\n\n\n" + ADD, "free/b.py": "import os\n\n" + ADD.replace("add", "plus")
                                          .replace("total", "result")})
        self.prepared(fill, held_out="aside")
        self.assertEqual([piece["package"] for piece in self.held_out_pieces], ["aside"])
        self.assertEqual(["plus" in piece["text"] for piece in self.train_pieces], [True])

    def test_where_local_names_are(self):
        sample, = prepare.functions_of("class A:\n    " + ADD.replace("\n    ", "\n        "))
        text = sample["text"]
        self.assertEqual(sorted(sample["names"]), ["first", "second", "total"])
        for name, where in sample["names"].items():
            self.assertEqual({text[begin:end] for begin, end in where}, {name})
        self.assertEqual(text[sample["body"]:].strip().split("\n")[0], "total = first + second")


class SyntheticTest(unittest.TestCase):
    def test_every_function_parses_and_held_out_nouns_are_apart(self):
        rng = random.Random(5)
        for index in range(3000):
            text = synthetic.function(rng, held_out=index % 2 == 0)
            self.assertEqual(len(ast.parse(text).body), 1)
        self.assertFalse(set(synthetic.NOUNS) & set(synthetic.HELD_OUT_NOUNS))


if __name__ == "__main__":
    unittest.main(verbosity=2)
