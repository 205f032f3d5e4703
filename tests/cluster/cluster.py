"""A whole cluster of real processes on loopback, for tests: redis-server, schedulers, workers, gateways.

    with Cluster(workers=2) as cluster:
        cluster.wait_ready()
        requests.post(cluster.url + "/v1/completions", ...)
        cluster.workers[0].kill()

Each process logs to a file of the cluster's folder; `print_logs()` shows their ends when a test fails.
"""
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time

from fault_proxy import FaultProxy

SOURCE = os.environ.get("CINNABAR_SOURCE_DIR") or os.path.abspath(
    os.path.join(os.path.dirname(__file__), "../.."))
BIN = os.environ.get("CINNABAR_BIN_DIR") or os.path.join(SOURCE, "build/release/bin")
MODEL = os.path.join(SOURCE, "models/cinnabar-tiny")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Process:
    """One program. Restarted with the same arguments by start()."""

    def __init__(self, name, args, folder, restore_signals=True):
        self.name = name
        self.restore_signals = restore_signals
        self.args = args
        self.log_path = os.path.join(folder, name + ".log")
        self.child = None

    def start(self):
        with open(self.log_path, "ab") as log:
            self.child = subprocess.Popen(self.args, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                          restore_signals=self.restore_signals)
        return self

    @property
    def pid(self):
        return self.child.pid

    def alive(self):
        return self.child is not None and self.child.poll() is None

    def signal(self, number):
        if self.alive():
            self.child.send_signal(number)

    def kill(self):
        self.signal(signal.SIGKILL)
        if self.child is not None:
            self.child.wait()

    def freeze(self):
        self.signal(signal.SIGSTOP)

    def thaw(self):
        self.signal(signal.SIGCONT)

    def stop(self, timeout=20):
        """SIGTERM, and waits. Returns the exit status, or None after a SIGKILL was needed."""
        if not self.alive():
            return None if self.child is None else self.child.returncode
        self.thaw()
        self.signal(signal.SIGTERM)
        try:
            return self.child.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def log(self):
        try:
            with open(self.log_path, encoding="utf-8", errors="replace") as log:
                return log.read()
        except FileNotFoundError:
            return ""


class Cluster:
    def __init__(self, workers=1, schedulers=1, gateways=1, model=MODEL, model_name="cinnabar-tiny",
                 appendfsync="everysec", device="cpu", null_step_us=None, worker_args=(), gateway_args=(),
                 scheduler_args=(), redis_config=(), redis_port=None, proxied=False):
        self.folder = tempfile.mkdtemp(prefix="cinnabar_cluster_")
        self.model, self.model_name = model, model_name
        self.redis_port = redis_port or free_port()
        self.redis_address = f"127.0.0.1:{self.redis_port}"
        # With `proxied`, each kind of program reaches Redis through a proxy of its own.
        self.proxies = {kind: FaultProxy(self.redis_port) for kind in ("scheduler", "worker", "gateway")} if proxied else {}
        data = os.path.join(self.folder, "redis")
        os.mkdir(data)
        config = os.path.join(self.folder, "redis.conf")
        with open(config, "w", encoding="utf-8") as out:
            out.write("\n".join([
                f"port {self.redis_port}", "bind 127.0.0.1", f"dir {data}", "appendonly yes",
                f"appendfsync {appendfsync}", 'save ""', "maxmemory-policy noeviction", *redis_config]) + "\n")
        # Signals stay as Python has them: a log that meets RLIMIT_FSIZE is a failed write then, not SIGXFSZ.
        self.redis = Process("redis", ["redis-server", config], self.folder, restore_signals=False)
        self.schedulers = [self._program("cinnabar-scheduler", f"scheduler-{i}", [
            "--redis", self._redis_for("scheduler"), "--name", f"scheduler-{i}", "--metrics-listen", "127.0.0.1:0",
            *scheduler_args]) for i in range(schedulers)]
        model_args = ["--device", device]
        if device == "null":
            model_args += ["--null-step-us", str(null_step_us or 100)]
        self.workers = [self._program("cinnabar-worker", f"worker-{i}", [
            "--redis", self._redis_for("worker"), "--name", f"worker-{i}", "--model", model, "--model-name", model_name,
            "--threads", "1", "--metrics-listen", "127.0.0.1:0", *model_args, *worker_args])
            for i in range(workers)]
        self.gateway_ports = [free_port() for _ in range(gateways)]
        self.grpc_ports = [free_port() for _ in range(gateways)]
        self.gateways = [self._program("cinnabar-gateway", f"gateway-{i}", [
            "--redis", self._redis_for("gateway"), "--listen", f"127.0.0.1:{self.gateway_ports[i]}",
            "--grpc-listen", f"127.0.0.1:{self.grpc_ports[i]}", "--name", f"gateway-{i}",
            "--model", f"{model_name}={model}", *gateway_args]) for i in range(gateways)]

    def _redis_for(self, kind):
        return self.proxies[kind].address if self.proxies else self.redis_address

    def _program(self, program, name, args):
        return Process(name, [os.path.join(BIN, program), *args], self.folder)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.gateway_ports[0]}"

    def processes(self):
        return [self.redis, *self.schedulers, *self.workers, *self.gateways]

    def start(self):
        self.redis.start()
        self.wait_redis()
        for process in [*self.schedulers, *self.workers, *self.gateways]:
            process.start()
        return self

    def wait_redis(self, timeout=20):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                with socket.create_connection(("127.0.0.1", self.redis_port), 1) as link:
                    link.sendall(b"PING\r\n")
                    if link.recv(16).startswith(b"+PONG"):
                        return
            except OSError:
                pass
            time.sleep(0.05)
        raise TimeoutError("redis-server does not answer")

    def wait_ready(self, timeout=60):
        """Every gateway says it is ready: it reached Redis, and a worker serves the model."""
        end = time.monotonic() + timeout
        waiting = list(self.gateway_ports)
        while waiting:
            if time.monotonic() > end:
                self.print_logs()
                raise TimeoutError("the gateway is not ready")
            try:
                if get(waiting[0], "/readyz")[0] == 200:
                    waiting.pop(0)
                    continue
            except OSError:
                pass
            time.sleep(0.05)
        return self

    def print_logs(self, lines=40):
        for process in self.processes():
            text = process.log().splitlines()[-lines:]
            print(f"--- {process.name}", *text, sep="\n", flush=True)

    def stop(self):
        for group in (self.gateways, self.workers, self.schedulers, [self.redis]):
            for process in group:
                process.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self.__exit__(True, None, None)
            raise

    def __exit__(self, kind, value, trace):
        if kind is not None:
            self.print_logs()
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def redis_command(port, *args, timeout=10):
    """One command to a Redis on loopback; the reply as int, str, bytes, None or list. RuntimeError: an error reply."""
    with socket.create_connection(("127.0.0.1", port), timeout) as link:
        parts = [arg if isinstance(arg, bytes) else str(arg).encode() for arg in args]
        link.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
        file = link.makefile("rb")

        def read():
            line = file.readline()
            kind, rest = line[:1], line[1:-2]
            if kind == b"-":
                raise RuntimeError(rest.decode())
            if kind == b"+":
                return rest.decode()
            if kind == b":":
                return int(rest)
            if kind == b"$":
                return None if rest == b"-1" else file.read(int(rest) + 2)[:-2]
            if kind == b"*":
                return None if rest == b"-1" else [read() for _ in range(int(rest))]
            raise ConnectionError("Redis closed the connection")

        return read()


def get(port, path, headers=None, timeout=10):
    """(status, body bytes, headers) of a GET."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        link.request("GET", path, headers=headers or {})
        reply = link.getresponse()
        return reply.status, reply.read(), dict(reply.getheaders())
    finally:
        link.close()


def post(port, path, body, headers=None, timeout=60):
    """(status, parsed JSON, headers) of a POST of JSON."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        link.request("POST", path, json.dumps(body), {"content-type": "application/json", **(headers or {})})
        reply = link.getresponse()
        return reply.status, json.loads(reply.read() or b"null"), dict(reply.getheaders())
    finally:
        link.close()


def stream(port, path, body, headers=None, timeout=60):
    """Yields (event id, data) of a stream of server-sent events; [DONE] is not among them."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        link.request("POST", path, json.dumps({**body, "stream": True}),
                     {"content-type": "application/json", **(headers or {})})
        reply = link.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {reply.read().decode()}")
        event_id = ""
        for line in reply:
            line = line.rstrip(b"\r\n").decode()
            if line.startswith("id:"):
                event_id = line[3:].strip()
            elif line.startswith("data:"):
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                yield event_id, json.loads(data)
    finally:
        link.close()
