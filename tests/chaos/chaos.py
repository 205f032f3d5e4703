#!/usr/bin/env python3
"""Chaos: a cluster of real processes and a real Redis under faults, and a check of everything its clients saw.

  tests/chaos/chaos.py                        60 seconds, a seeded mix of all faults
  tests/chaos/chaos.py --minutes 30 --seed 7
  tests/chaos/chaos.py --faults worker_kill,redis_kill --seconds 20
  tests/chaos/chaos.py --mutant ledger_twice --seconds 10     a broken queue function: the check must fail

Exit status 0: every promise held. README.md of this folder says which row of the failure matrix each fault is.
"""
import argparse
import http.client
import json
import os
import random
import resource
import shutil
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../cluster"))
from cluster import Cluster, redis_command  # noqa: E402
from history import Observation, Seen, check  # noqa: E402

MODEL = "cinnabar-tiny"
POISON = 1000  # first token of prompts that break the null device (--null-faults)
LEASE = 2
PATIENCE = 120  # seconds until an accepted request counts as lost
CLIENTS = 10

# One text of the queue library in, a broken one out: what the check must notice.
MUTANTS = {
    "ledger_twice": ("call('XADD', P .. 'ledger', '*', 'v', 1,",
                     "call('XADD', P .. 'ledger', '*', 'rid', rid, 'st', st)\n  call('XADD', P .. 'ledger', '*', 'v', 1,"),
    "no_ledger": ("call('XADD', P .. 'ledger', '*', 'v', 1,", "call('EXISTS', P .. 'ledger', '*', 'v', 1,"),
    "ended_twice": ("if TERMINAL[h[1]] then return {'ALREADY', 0, h[1]} end", ""),
    "keys_forgotten": ("if st then  -- a key whose request is gone", "if false then  -- a key whose request is gone"),
    "deltas_forgotten": ("if upto > from then", "if false then"),
    "quota_kept": ("call('HSET', P .. 'tot', 'n', (tonumber(tot[1]) or 0) - 1,",
                   "call('HSET', P .. 'tot', 'n', (tonumber(tot[1]) or 0),"),
}


# Row of the failure matrix -> faults. Row 8, clients that leave, is always on.
ROWS = {1: ["worker_kill", "worker_drain"], 2: ["worker_freeze"], 3: ["poison"], 4: ["poison"], 5: ["scheduler_kill"],
        6: ["scheduler_freeze"], 7: ["gateway_kill"], 8: [], 9: ["slow_reader"], 10: ["redis_kill", "redis_rewind"],
        13: ["redis_full"], 14: ["disk_full"], 15: ["redis_freeze"], 16: ["redis_empty"], 17: ["functions_flushed"],
        18: ["gateway_cut", "network_slow", "network_reset"], 19: ["worker_cut"], 20: ["lost_replies"], 27: ["poison"],
        28: ["overload"]}
TRY_LATER = {"unavailable", "server_overloaded", "rate_limit_exceeded"}  # of an error inside a stream: it can be resumed


class Profile:
    """A request whose answer is always the same."""

    def __init__(self, name, first, tokens, steps, **more):
        self.name = name
        self.body = {"model": MODEL, "prompt": [first, 7, 8, 9], "max_tokens": tokens, "seed": first,
                     "diffusion": {"steps": steps, "deadline_seconds": PATIENCE}, **more}


PROFILES = [Profile(f"p{i}", 100 + i, 16 + 8 * (i % 4), 16 + 8 * (i % 4), temperature=0.8 * (i % 2)) for i in range(8)]
POISONS = {"poison_abort": POISON, "poison_fail": POISON + 2, "poison_nan": POISON + 3}


class Client(threading.Thread):
    """Makes requests one after the other and writes down what it sees."""

    def __init__(self, run, number):
        super().__init__(daemon=True)
        self.run_ = run
        self.random = random.Random(run.seed * 1000 + number)
        self.number = number
        self.count = 0

    def run(self):
        while not self.run_.stopping.is_set():
            seen = Seen("answer", self.random.choice(PROFILES).name)
            shape = self.random.random()
            for below, kind in ((0.1, "leaver"), (0.17, "canceller"), (0.24, "late")):
                if shape < below:
                    seen.kind = kind
                    break
            act = self.late if seen.kind == "late" else self.stream if shape < 0.75 else self.whole
            seen.began = time.monotonic()
            try:
                act(seen, self.run_.profiles[seen.profile])
            except Exception as error:  # a bug of this harness: shown, and counted as a failure
                self.run_.harness_errors.append(f"{type(error).__name__}: {error}")
            seen.ended = time.monotonic()
            with self.run_.lock:
                self.run_.history.append(seen)
            if seen.refused:
                time.sleep(0.2)

    def key(self):
        self.count += 1
        return f"chaos-{self.run_.seed}-{self.number}-{self.count}"

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.random.choice(self.run_.cluster.gateway_ports), timeout=PATIENCE)

    # A refusal (before anything was accepted) ends the request; what gave no answer is asked again with the same key.
    def refused(self, seen, reply):
        body = json.loads(reply.read() or b"{}")
        code = (body.get("error") or {}).get("code") or str(reply.status)
        if seen.accepted:
            return None if reply.status in (429, 503) else code
        if reply.status == 503 and seen.observations:
            return None  # an earlier try may have been accepted: the queue could not be asked
        seen.refused = code
        return code

    def whole(self, seen, profile):
        key = self.key()
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            link = self.connect()
            try:
                link.request("POST", "/v1/completions", json.dumps(profile.body),
                             {"content-type": "application/json", "idempotency-key": key})
                reply = link.getresponse()
                if reply.status == 200:
                    body = json.loads(reply.read())
                    seen.request = body["id"].split("-", 1)[1] + ".0"
                    seen.accepted = True
                    seen.text = body["choices"][0]["text"]
                    seen.observations.append(Observation(final="done"))
                    return
                code = self.refused(seen, reply)
                if code:
                    seen.observations.append(Observation(final="" if seen.refused else code))
                    return
            except (OSError, http.client.HTTPException):
                seen.observations.append(Observation())
            finally:
                link.close()
            time.sleep(0.2)

    def late(self, seen, profile):
        """A deadline that may well pass. One try: nobody waits for what is late."""
        body = {**profile.body, "diffusion": {**profile.body["diffusion"], "deadline_seconds": self.random.uniform(0.05, 1)}}
        link = self.connect()
        try:
            link.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            reply = link.getresponse()
            answer = json.loads(reply.read())
            code = "done" if reply.status == 200 else answer["error"].get("code")
            if code in ("done", "deadline_exceeded", "deadline_infeasible"):
                seen.request = reply.getheader("x-request-id") + ".0"
                seen.accepted = True
                seen.observations.append(Observation(final=code))
            else:
                seen.refused = code
        except (OSError, http.client.HTTPException):
            seen.observations.append(Observation())
        finally:
            link.close()

    def delete(self, request):
        """Until a gateway has an answer: that it is cancelled, or had ended."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            link = self.connect()
            try:
                link.request("DELETE", "/v1/requests/" + request)
                reply = link.getresponse()
                reply.read()
                if reply.status not in (429, 503):
                    return
            except (OSError, http.client.HTTPException):
                pass
            finally:
                link.close()
            time.sleep(0.2)

    def stream(self, seen, profile):
        key = self.key()
        last_id, last_step, text = "", 0, ""
        leave_at = self.random.randrange(1, 12) if seen.kind == "leaver" else None
        # A canceller asks at some step, or when all is over.
        cancel_at = self.random.randrange(1, 24) if seen.kind == "canceller" else None
        end = time.monotonic() + PATIENCE
        body = {**profile.body, "stream": True, "diffusion": {**profile.body["diffusion"], "frames": True}}
        while time.monotonic() < end:
            link = self.connect()
            observation = Observation(after=last_step)
            try:
                headers = {"content-type": "application/json", "idempotency-key": key}
                if last_id:
                    headers["last-event-id"] = last_id
                else:
                    text = ""
                link.request("POST", "/v1/completions", json.dumps(body), headers)
                reply = link.getresponse()
                if reply.status != 200:
                    code = self.refused(seen, reply)
                    if code:
                        observation.final = "" if seen.refused else code
                        seen.observations.append(observation)
                        return
                    seen.observations.append(observation)
                    time.sleep(0.2)
                    continue
                seen.accepted = True
                seen.request = reply.getheader("cinnabar-request-id") + ".0"
                seen.observations.append(observation)
                event_id, broken = "", False
                for line in reply:
                    line = line.rstrip(b"\r\n").decode()
                    if line.startswith("id:"):
                        event_id = line[3:].strip()
                        continue
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        if not observation.final:
                            observation.final = "no finish reason"
                        seen.text = text
                        if cancel_at is not None:
                            self.delete(seen.request[:-2])
                        return
                    chunk = json.loads(data)
                    if "error" in chunk:
                        code = chunk["error"].get("code") or "error"
                        broken = code in TRY_LATER
                        if broken:
                            break
                        observation.final = code
                        return
                    frame = chunk.get("diffusion")
                    if frame and "step" in frame:
                        observation.steps.append(frame["step"])
                        observation.frames[frame["step"]] = json.dumps(frame, sort_keys=True)
                    for choice in chunk.get("choices", ()):
                        text += choice.get("text") or ""
                        if choice.get("finish_reason"):
                            observation.final = "done"
                    if event_id and not (frame and "step" in frame):
                        # A whole event has come once its last chunk has.
                        last_id, last_step = event_id, int(event_id.rsplit(":", 1)[1])
                    elif event_id:
                        last_id, last_step = event_id, frame["step"]
                    if cancel_at is not None and last_step >= cancel_at:
                        cancel_at = None
                        self.delete(seen.request[:-2])
                        self.delete(seen.request[:-2])  # twice is once
                    if leave_at is not None and last_step >= leave_at:
                        return  # closes the connection
            except (OSError, http.client.HTTPException, ValueError):
                if not (seen.observations and seen.observations[-1] is observation):
                    seen.observations.append(observation)
            finally:
                link.close()
            time.sleep(0.1)


class Nemesis:
    """One fault at a time, each healed before the next."""

    def __init__(self, run):
        self.run = run
        self.cluster = run.cluster
        self.random = random.Random(run.seed)
        self.done = {}

    def faults(self):
        return {name[6:]: getattr(self, name) for name in dir(self) if name.startswith("fault_")}

    def aof(self):
        folder = os.path.join(self.cluster.folder, "redis", "appendonlydir")
        return os.path.join(folder, next(name for name in sorted(os.listdir(folder)) if name.endswith(".incr.aof")))

    def pick(self, processes):
        return self.random.choice(processes)

    def kill(self, process, away):
        process.kill()
        time.sleep(away)
        process.start()

    def freeze(self, process, seconds):
        process.freeze()
        time.sleep(seconds)
        process.thaw()

    def fault_worker_kill(self):  # row 1
        self.kill(self.pick(self.cluster.workers), self.random.uniform(0, 1))

    def fault_worker_freeze(self):  # row 2: longer than its lease; what it writes afterwards is fenced
        self.freeze(self.pick(self.cluster.workers), LEASE + 2)

    def fault_worker_drain(self):
        worker = self.pick(self.cluster.workers)
        worker.stop()
        worker.start()

    def fault_scheduler_kill(self):  # row 5
        self.kill(self.pick(self.cluster.schedulers), 1)

    def fault_scheduler_freeze(self):  # row 6: two leaders when it comes back
        self.freeze(self.pick(self.cluster.schedulers), 4)

    def fault_gateway_kill(self):  # row 7
        self.kill(self.pick(self.cluster.gateways), 0.3)

    def fault_slow_reader(self):  # row 9
        port = self.random.choice(self.cluster.gateway_ports)
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        link.request("POST", "/v1/completions", json.dumps({**PROFILES[0].body, "stream": True, "diffusing": True}),
                     {"content-type": "application/json"})
        time.sleep(3)
        seen = Seen("leaver", PROFILES[0].name)
        reply = link.getresponse()
        if reply.status == 200:
            seen.accepted, seen.request = True, reply.getheader("cinnabar-request-id") + ".0"
        else:
            seen.refused = str(reply.status)
        link.close()
        with self.run.lock:
            self.run.history.append(seen)

    def fault_redis_kill(self):  # row 10
        self.kill(self.cluster.redis, self.random.uniform(0, 1))
        self.cluster.wait_redis()

    def fault_redis_rewind(self):  # rows 10, 11: the last writes never reached the disk, a call is cut in its middle
        log = self.aof()
        since, length = time.monotonic(), os.path.getsize(log)
        time.sleep(self.random.uniform(0.05, 0.5))
        self.cluster.redis.kill()
        # What was under way while it died counts as well: its gateway may have been told of the end, and nobody else.
        self.run.rewinds.append((since - 1.1, time.monotonic() + 0.5))
        os.truncate(log, length)
        time.sleep(self.random.uniform(0, 1))
        self.cluster.redis.start()
        self.cluster.wait_redis()

    def fault_redis_empty(self):  # row 16: the wrong volume; nothing is admitted to it, and nothing of it stays
        data = os.path.join(self.cluster.folder, "redis")
        self.cluster.redis.kill()
        os.rename(data, data + ".right")
        os.mkdir(data)
        self.cluster.redis.start()
        self.cluster.wait_redis()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            link = Client(self.run, 950).connect()
            try:
                link.request("POST", "/v1/completions", json.dumps(PROFILES[0].body), {"content-type": "application/json"})
                status = link.getresponse().status
            except (OSError, http.client.HTTPException):
                status = None
            finally:
                link.close()
            if status == 200:
                self.run.harness_errors.append("an empty Redis was served")
            time.sleep(0.3)
        self.cluster.redis.kill()
        shutil.rmtree(data)
        os.rename(data + ".right", data)
        self.cluster.redis.start()
        self.cluster.wait_redis()

    def fault_network_slow(self):
        self.proxy(self.random.choice(["gateway", "worker", "scheduler"]), "delay", 2)

    def fault_network_reset(self):
        self.proxy(self.random.choice(["gateway", "worker", "scheduler"]), "reset", 0.5)

    def fault_redis_full(self):  # row 13
        used = redis_command(self.cluster.redis_port, "INFO", "memory").decode()
        used = int(used.split("used_memory:")[1].split("\r")[0])
        redis_command(self.cluster.redis_port, "CONFIG", "SET", "maxmemory", used + 20000)
        time.sleep(2)
        redis_command(self.cluster.redis_port, "CONFIG", "SET", "maxmemory", 0)

    def fault_disk_full(self):  # row 14: the log cannot grow; with everysec Redis answers MISCONF, with always it exits
        size = os.path.getsize(self.aof()) + self.random.randrange(4096)  # somewhere within a call
        for limit, seconds in ((size, 2), (resource.RLIM_INFINITY, 0)):
            if self.cluster.redis.alive():
                resource.prlimit(self.cluster.redis.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            time.sleep(seconds)
        if not self.cluster.redis.alive():
            self.cluster.redis.start()
        self.cluster.wait_redis()

    def fault_redis_freeze(self):  # row 15
        self.freeze(self.cluster.redis, 3)

    def fault_functions_flushed(self):  # row 17
        if not self.run.mutant:
            redis_command(self.cluster.redis_port, "FUNCTION", "FLUSH")

    def proxy(self, kind, mode, seconds):
        self.cluster.proxies[kind].set(mode)
        time.sleep(seconds)
        self.cluster.proxies[kind].set("pass")

    def fault_gateway_cut(self):  # row 18
        self.proxy("gateway", self.random.choice(["cut", "blackhole"]), 2)

    def fault_worker_cut(self):  # row 19: longer than the lease
        self.proxy("worker", self.random.choice(["cut", "blackhole"]), LEASE + 2)

    def fault_lost_replies(self):  # row 20
        self.proxy(self.random.choice(["gateway", "worker", "scheduler"]), "swallow_replies", 1)

    def fault_poison(self):  # rows 3, 4 and 27
        name = self.random.choice(sorted(POISONS))
        seen = Seen("poison", name)
        client = Client(self.run, 900)
        client.key = lambda: f"poison-{self.run.seed}-{len(self.run.history)}-{time.monotonic_ns()}"
        reviver_stop = threading.Event()

        def revive():  # what a service manager does
            while not reviver_stop.wait(0.2):
                for worker in self.cluster.workers:
                    if not worker.alive():
                        worker.start()

        reviver = threading.Thread(target=revive, daemon=True)
        reviver.start()
        began = time.monotonic()
        client.whole(seen, Profile(name, POISONS[name], 16, 16))
        if time.monotonic() - began > PATIENCE / 2:
            self.run.harness_errors.append(f"{name} was not given up")
        reviver_stop.set()
        reviver.join()
        for worker in self.cluster.workers:
            if not worker.alive():
                worker.start()
        # The client of a poison hears an error of the service: that is its end, not a refusal.
        if seen.refused in ("request_failed", "server_error"):
            seen.refused = ""
        with self.run.lock:
            self.run.history.append(seen)

    def fault_overload(self):  # row 28: three times what is under way, at once
        more = [Client(self.run, 500 + i) for i in range(2 * CLIENTS)]
        stop = threading.Timer(2, self.run.burst_over.set)
        stop.start()
        for client in more:
            client.run_ = Burst(self.run)
            client.start()
        for client in more:
            client.join(PATIENCE)
        self.run.burst_over.clear()

    def loop(self, names, until):
        faults = self.faults()
        if self.run.device != "null":
            faults.pop("poison")
        names = [name for name in faults if name in names or not names]
        order = []
        while time.monotonic() < until:
            if not order:
                order = names[:]
                self.random.shuffle(order)
            name = order.pop()
            begin = time.monotonic()
            faults[name]()
            self.done[name] = self.done.get(name, 0) + 1
            print(f"{time.monotonic() - self.run.begun:6.1f} s  {name} ({time.monotonic() - begin:.1f} s)  "
                  f"{len(self.run.history)} requests so far", flush=True)
            time.sleep(self.random.uniform(0.2, 0.8))


class Burst:
    """The run, for clients that stop when the burst is over."""

    def __init__(self, run):
        self.__dict__.update(run.__dict__)
        self.stopping = run.burst_over


class Run:
    def __init__(self, options):
        self.seed = options.seed
        self.mutant = options.mutant
        self.lock = threading.Lock()
        self.history = []
        self.harness_errors = []
        self.rewinds = []
        self.frames = {}  # profile -> step -> content
        self.profiles = {profile.name: profile for profile in PROFILES}
        self.stopping = threading.Event()
        self.burst_over = threading.Event()
        self.device = options.device
        null = ["--null-faults", str(POISON)] if self.device == "null" else []
        self.cluster = Cluster(
            workers=2, schedulers=2, gateways=2, device=self.device, null_step_us=20000, proxied=True,
            appendfsync=options.fsync,
            worker_args=["--lease-seconds", str(LEASE), "--hang-seconds", "3", "--drain-seconds", "1", "--snapshot-every", "4", *null],
            scheduler_args=["--lead-seconds", "2"])

    def references(self):
        """The undisturbed answers."""
        texts = {}
        for profile in PROFILES:
            for way in ("stream", "whole"):
                seen = Seen("answer", profile.name)
                client = Client(self, 999)
                client.key = lambda key=f"reference-{way}-{profile.name}": key
                getattr(client, way)(seen, profile)
                if seen.text is None or len(seen.observations) > 1:
                    raise RuntimeError(f"no reference for {profile.name}: {seen}")
                self.history.append(seen)
                if way == "stream":
                    texts[profile.name] = seen.text
                    self.frames[profile.name] = seen.observations[0].frames
        return texts

    def break_library(self):
        library = redis_command(self.cluster.redis_port, "FUNCTION", "LIST", "WITHCODE")
        fields = library[0]
        code = fields[fields.index(b"library_code") + 1].decode()
        find, replace = MUTANTS[self.mutant]
        if find not in code:
            raise RuntimeError(f"the mutation {self.mutant} finds nothing to change")
        redis_command(self.cluster.redis_port, "FUNCTION", "LOAD", "REPLACE", code.replace(find, replace))

    def settle(self):
        """Until nothing is under way; how many requests still are."""
        end = time.monotonic() + 30
        while True:
            total = redis_command(self.cluster.redis_port, "HGET", "cb:{default}:tot", "n")
            live = int(total or 0)
            if live == 0 or time.monotonic() > end:
                return live
            time.sleep(0.2)

    def ledger(self):
        entries = redis_command(self.cluster.redis_port, "XRANGE", "cb:{default}:ledger", "-", "+", timeout=60)
        found = []
        for _, fields in entries:
            pairs = dict(zip(fields[::2], fields[1::2]))
            found.append((pairs[b"rid"].decode(), pairs[b"st"].decode()))
        return found

    def go(self, seconds, names):
        self.begun = time.monotonic()
        with self.cluster:
            self.cluster.wait_ready()
            references = self.references()
            if self.mutant:
                self.break_library()
            clients = [Client(self, i) for i in range(CLIENTS)]
            for client in clients:
                client.start()
            nemesis = Nemesis(self)
            nemesis.loop(names, time.monotonic() + seconds)
            self.stopping.set()
            for client in clients:
                client.join(PATIENCE + 10)
            stuck = sum(client.is_alive() for client in clients)
            live = self.settle()
            wrong = check(self.history, self.ledger(), live, references, self.frames, self.rewinds)
            wrong += [f"harness: {error}" for error in self.harness_errors]
            if stuck:
                wrong.append(f"{stuck} clients still wait")
            kinds = {}
            for seen in self.history:
                kind = "refused" if seen.refused else seen.kind if seen.accepted or seen.kind == "poison" else "unanswered"
                kinds[kind] = kinds.get(kind, 0) + 1
            resumed = sum(len(seen.observations) > 1 for seen in self.history)
            print(f"{len(self.history)} requests: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) +
                  f"; {resumed} over several connections; faults: " +
                  ", ".join(f"{name} x{count}" for name, count in sorted(nemesis.done.items())))
            for line in wrong[:20]:
                print("VIOLATION", line)
            if wrong and not self.mutant:
                self.cluster.print_logs(30)
            answered = kinds.get("answer", 0)
            if answered < 10:
                wrong.append("hardly anything was answered")
                print("VIOLATION hardly anything was answered")
            return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", default="", help="comma-separated; default: all")
    parser.add_argument("--rows", default="", help="of the failure matrix, comma-separated, in place of --faults")
    parser.add_argument("--device", choices=["null", "cpu"], default="null", help="cpu: a real model, small and slow")
    parser.add_argument("--fsync", choices=["always", "everysec"], default="everysec")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="breaks the queue on purpose")
    options = parser.parse_args()
    names = [name for name in options.faults.split(",") if name]
    for row in filter(None, options.rows.split(",")):
        if not row.isdigit() or int(row) not in ROWS:
            parser.error(f"no fault here is of row {row}; there are " + ", ".join(map(str, ROWS)))
        names += ROWS[int(row)]
    unknown = [name for name in names if not hasattr(Nemesis, "fault_" + name)]
    if unknown:
        parser.error(f"no fault {unknown[0]}; there are " + ", ".join(n[6:] for n in dir(Nemesis) if n.startswith("fault_")))
    seconds = options.minutes * 60 if options.minutes else options.seconds
    wrong = Run(options).go(seconds, names)
    print("every promise held" if not wrong else f"{len(wrong)} violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
