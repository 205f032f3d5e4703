"""How good a model is, and what a denoising step buys: fills in held-out functions through the engine.

  python3 -m training.evaluate --bin build/release/bin --model DIR --held-out CORPUS/held_out.jsonl --out DIR
  python3 -m training.evaluate --url http://127.0.0.1:8080 --served NAME --model DIR --held-out ... --out DIR

Starts `cinnabar up` on a free port unless --url names a running gateway. Writes results.json, table.md and quality.svg.

Tasks, the same for every model (they are cut from text, by --seed):
  line    one line of a body, without its indentation        lines   two or three
  span    one to eight words anywhere behind the signature   body    all behind signature and docstring; no suffix
The canvas holds as many tokens as the true answer has, and --slack more, which the model must fill with its end of text.
exact: equal but for blanks at both ends. parses: the function with the gap filled does. similar: difflib's ratio. named (body): every name
that is read is a parameter, assigned, a builtin, or read in the true function too.
"""

import argparse
import ast
import builtins
import collections
import concurrent.futures
import difflib
import http.client
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import tempfile
import time
import urllib.parse

from training import plot, synthetic

KINDS = ("line", "lines", "span", "body")
Task = collections.namedtuple("Task", "kind prefix answer suffix")


def cut(kind, text, body, rng):
    """A Task, or None where the function has no such gap."""
    lines = [m.span() for m in re.finditer(r"[^\n]+", text)]
    inside = [i for i, (begin, _) in enumerate(lines) if begin >= body and text[begin:].strip()]
    if kind in ("line", "lines"):
        count = 1 if kind == "line" else rng.choice([2, 3])
        starts = [i for i in inside if i + count <= len(lines)]
        if not starts:
            return None
        first = rng.choice(starts)
        begin, end = lines[first][0], lines[first + count - 1][1]
        begin += len(text[begin:end]) - len(text[begin:end].lstrip(" "))
    elif kind == "span":
        cuts = [m.start() for m in re.finditer(r"\b", text) if m.start() > text.index("\n")]
        if len(cuts) < 4:
            return None
        first = rng.randrange(len(cuts) - 1)
        begin, end = cuts[first], cuts[min(len(cuts) - 1, first + rng.randrange(1, 9))]
    else:
        begin, end = body, len(text)
    answer = text[begin:end]
    return Task(kind, text[:begin], answer, text[end:]) if answer.strip() else None


def make_tasks(held_out, each, seed, length_max, count_tokens):
    """`each` of a kind from the held-out functions (name "real"), and of the synthetic domain with nouns never trained on."""
    rng = random.Random(seed)
    samples = [json.loads(line) for line in open(held_out, encoding="utf-8")]
    made = {}
    for kind in KINDS:
        tasks = []
        order = samples[:]
        rng.shuffle(order)
        for sample in order:
            task = cut(kind, sample["text"], sample["body"], rng)
            if task and count_tokens(sample["text"]) + 1 <= length_max:
                tasks.append(task)
            if len(tasks) == each:
                break
        made["real", kind] = tasks
        tasks = []
        while len(tasks) < each:
            text = synthetic.function(rng, held_out=True)
            doc = text.find('"""\n')
            task = cut(kind, text, doc + 4 if doc >= 0 else text.index("\n") + 1, rng)
            if task and count_tokens(text) + 1 <= length_max:
                tasks.append(task)
        made["synthetic", kind] = tasks
    return made


def parses(text):
    try:
        ast.parse(text)
        return True
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def names_read(text):
    """(names read, names bound) anywhere in the text."""
    read, bound = set(), set(dir(builtins))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
    return read, bound


def judge(task, text):
    """Scores of one answer, 0 to 1."""
    whole = task.prefix + text + task.suffix
    good = parses(whole)
    scores = {"exact": text.strip() == task.answer.strip(), "parses": good,
              "similar": difflib.SequenceMatcher(None, text.strip(), task.answer.strip(), autojunk=False).ratio()}
    if task.kind == "body":
        scores["named"] = False
        if good:
            read, bound = names_read(whole)
            true_read, _ = names_read(task.prefix + task.answer + task.suffix)
            scores["named"] = not read - bound - true_read
    return scores


class Client:
    def __init__(self, url, model):
        parts = urllib.parse.urlsplit(url)
        self.host, self.port, self.model = parts.hostname, parts.port or 80, model

    def fill(self, task, tokens, diffusion, temperature, seed=1):
        """(answer, usage). Waits and tries again where the cluster is full."""
        body = {"model": self.model, "prompt": task.prefix, "max_tokens": tokens, "temperature": temperature, "seed": seed,
                "diffusion": diffusion}
        if task.kind != "body":
            body["suffix"] = task.suffix
        for _ in range(100):
            link = http.client.HTTPConnection(self.host, self.port, timeout=300)
            try:
                link.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
                reply = link.getresponse()
                text = reply.read()
                if reply.status in (429, 503):
                    time.sleep(float(reply.getheader("retry-after", "1")))
                    continue
                answer = json.loads(text)
                if reply.status != 200:
                    raise RuntimeError("%d: %s" % (reply.status, answer["error"]["message"]))
                return answer["choices"][0]["text"], answer["usage"]
            finally:
                link.close()
        raise RuntimeError("the gateway refused a hundred times")


def measure(client, tasks, count_tokens, steps, sampler, slack, temperature, workers):
    """Means over the tasks. `steps` 0: a token a step."""
    def one(task):
        tokens = max(1, count_tokens(task.prefix + task.answer) - count_tokens(task.prefix)) + slack
        diffusion = dict(sampler)
        if "threshold" not in sampler:  # which takes as many steps as it needs
            diffusion["steps"] = min(steps, tokens) if steps else tokens
        text, usage = client.fill(task, tokens, diffusion, temperature)
        spent = usage.get("diffusion", {})
        return {**judge(task, text), "forwards": spent.get("forwards", 0), "tokens": spent.get("tokens_committed", tokens), "text": text}

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        made = list(pool.map(one, tasks))
    result = {name: sum(r[name] for r in made) / len(made) for name in ("exact", "parses", "similar")}
    if "named" in made[0]:
        result["named"] = sum(r["named"] for r in made) / len(made)
    result["forwards"] = sum(r["forwards"] for r in made) / len(made)
    result["tokens_per_forward"] = sum(r["tokens"] for r in made) / max(1, sum(r["forwards"] for r in made))
    result["count"] = len(made)
    result["samples"] = [{"prefix": t.prefix, "true": t.answer, "answer": r["text"]} for t, r in list(zip(tasks, made))[:5]]
    return result


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Cluster:
    """`cinnabar up` with one model, for as long as the `with` lasts."""

    def __init__(self, bin_folder, model):
        self.port = free_port()
        self.folder = tempfile.TemporaryDirectory(prefix="cinnabar_evaluate_")
        self.log = open(pathlib.Path(self.folder.name) / "log", "w+")
        self.process = subprocess.Popen(
            [str(pathlib.Path(bin_folder) / "cinnabar"), "up", "--model", "evaluated=" + str(model), "--listen", "127.0.0.1:%d" % self.port,
             "--grpc-listen", "", "--metrics-port", "0", "--data", self.folder.name, "--fsync", "everysec"],
            stdout=self.log, stderr=self.log)

    def __enter__(self):
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                link.request("GET", "/readyz")
                if link.getresponse().status == 200:
                    return self
            except OSError:
                pass
            finally:
                link.close()
            time.sleep(0.2)
        self.log.seek(0)
        raise RuntimeError("cinnabar up does not get ready:\n" + self.log.read()[-3000:])

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.folder.cleanup()


def table(results):
    lines = ["| tasks | gap | sampler | steps | forwards | tokens a forward | exact | parses | similar | names defined | n |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for r in results:
        lines.append("| %s | %s | %s | %s | %.1f | %.1f | %.1f %% | %.1f %% | %.2f | %s | %d |" % (
            r["set"], r["kind"], r["sampler"], r["steps"] or "all", r["forwards"], r["tokens_per_forward"], 100 * r["exact"],
            100 * r["parses"], r["similar"], "%.1f %%" % (100 * r["named"]) if "named" in r else "", r["count"]))
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="the model's folder, for its tokenizer, and to be served")
    parser.add_argument("--held-out", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--bin", default="build/release/bin", metavar="DIR", help="of the programs")
    parser.add_argument("--url", help="of a gateway that serves the model already")
    parser.add_argument("--served", default="evaluated", metavar="NAME", help="the model's name there")
    parser.add_argument("--each", type=int, default=200, metavar="N", help="tasks of a kind [200]")
    parser.add_argument("--steps", default="1,2,4,8,16,32,64,0", help="0: a token a step [1,2,4,8,16,32,64,0]")
    parser.add_argument("--thresholds", default="0.9,0.7,0.5", help="of the adaptive sampler [0.9,0.7,0.5]")
    parser.add_argument("--samplers", default="low_confidence", help="for the curves over steps; the plot shows the first [low_confidence]")
    parser.add_argument("--slack", type=int, default=0, metavar="N", help="tokens of canvas beyond the true answer [0]")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--length-max", type=int, default=128, metavar="N", help="tokens of a whole function [128]")
    parser.add_argument("--parallel", type=int, default=16, metavar="N", help="requests at once [16]")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(pathlib.Path(options.model) / "tokenizer.json"))
    count_tokens = lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    sets = make_tasks(options.held_out, options.each, options.seed, options.length_max, count_tokens)
    samplers = options.samplers.split(",")
    runs = [({"sampler": sampler}, int(steps)) for sampler in samplers for steps in options.steps.split(",")]
    runs += [({"sampler": "threshold", "threshold": float(t)}, 0) for t in options.thresholds.split(",") if t]
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    results, begun = [], time.monotonic()

    def work(client):
        for number, ((name, kind), tasks) in enumerate(sets.items()):
            for sampler, steps in runs:
                label = sampler["sampler"] + (" %g" % sampler["threshold"] if "threshold" in sampler else "")
                made = measure(client, tasks, count_tokens, steps, sampler, options.slack, options.temperature, options.parallel)
                results.append({"set": name, "kind": kind, "sampler": label, "steps": steps, **made})
                print("%4.0f s  %d/%d  %-9s %-5s %-15s steps %-3s exact %5.1f %%  parses %5.1f %%  similar %.2f" % (
                    time.monotonic() - begun, number + 1, len(sets), name, kind, label, steps or "all", 100 * made["exact"],
                    100 * made["parses"], made["similar"]), flush=True)

    if options.url:
        work(Client(options.url, options.served))
    else:
        with Cluster(options.bin, options.model) as cluster:
            work(Client("http://127.0.0.1:%d" % cluster.port, "evaluated"))
    (out / "results.json").write_text(json.dumps({"options": vars(options), "results": results}, indent=1) + "\n")
    (out / "table.md").write_text(table(results))
    curves = {}
    for r in results:
        if r["sampler"] == samplers[0] and r["steps"]:
            curves.setdefault("%s %s" % (r["set"], r["kind"]), []).append((r["steps"], 100 * r["parses"]))
    plot.chart(out / "quality.svg", "What a step buys", "denoising steps", "answers that parse, %", curves, x_log=True)
    print(table(results))


if __name__ == "__main__":
    main()
