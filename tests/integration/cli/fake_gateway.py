"""A gateway as far as its clients see it: HTTP/1.1, SSE, the objects of the API. Made to misbehave on request."""
import asyncio
import json
import threading


class FakeGateway:
    """Serves on a free port of 127.0.0.1, on a thread of its own, until close().

    `behave(request)` is called for each POST and returns a dict: delay (seconds before the head), steps, step_delay,
    status, error, headers, cut (close after so many frames), raw (bytes instead of an answer), text.
    """

    def __init__(self, behave=None, ssl=None):
        self.behave = behave or (lambda request: {})
        self.requests = []          # (path, headers, body) in the order of arrival
        self.open_now = self.open_peak = 0
        self.cancelled = 0
        self.stalled_until = 0.0
        self._ssl = ssl
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(10)

    @property
    def url(self):
        return f"{'https' if self._ssl else 'http'}://127.0.0.1:{self.port}"

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def stall(self, seconds):
        """From now on nothing is answered for so long."""
        self.stalled_until = self._loop.time() + seconds

    def _run(self):
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._ssl, backlog=4096))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _serve(self, reader, writer):
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.cancelled += 1
        except asyncio.CancelledError:
            pass
        finally:
            writer.close()

    async def _one(self, reader, writer):
        head = await reader.readline()
        if not head:
            return False
        method, path, _ = head.decode().split(" ", 2)
        headers = {}
        while (line := (await reader.readline()).decode().strip()):
            name, value = line.split(":", 1)
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if method == "GET":
            self._reply(writer, 200, {"object": "list", "data": [{"id": "fake-model", "object": "model"}]})
            await writer.drain()
            return True
        body = json.loads(body)
        self.requests.append((path, headers, body))
        self.open_now += 1
        self.open_peak = max(self.open_peak, self.open_now)
        try:
            return await self._answer(writer, path, body, self.behave(body) or {})
        finally:
            self.open_now -= 1

    async def _answer(self, writer, path, body, how):
        wait = max(how.get("delay", 0.0), self.stalled_until - self._loop.time())
        if wait > 0:
            await asyncio.sleep(wait)
        if "raw" in how:
            writer.write(how["raw"])
            await writer.drain()
            return False
        if how.get("status", 200) != 200:
            self._reply(writer, how["status"], {"error": how.get("error", {})}, how.get("headers", {}))
            await writer.drain()
            return how.get("keep", True)
        chat = "messages" in body
        tokens = body.get("max_tokens", 4)
        usage = {"prompt_tokens": 11, "completion_tokens": tokens,
                 "diffusion": {"steps": tokens, "forwards": max(1, tokens // 2), "tokens_per_forward": 2.0,
                               "queue_seconds": 0.001, "price_dollars": 0.000001 * tokens}}
        words = how.get("words") or [f"w{i} " for i in range(tokens)]
        text = "".join(words)
        if not body.get("stream"):
            choice = ({"message": {"role": "assistant", "content": text}} if chat else {"text": text})
            self._reply(writer, 200, {"id": "r", "choices": [{"index": 0, "finish_reason": "stop", **choice}],
                                      "usage": usage})
            await writer.drain()
            return how.get("keep", True)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

        def send(data):
            event = f"id: {send.count}\ndata: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
            send.count += 1
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
        send.count = 0

        def chunk(text="", **more):
            choice = {"index": 0, "finish_reason": None}
            choice.update({"delta": {"content": text} if text else {}} if chat else {"text": text})
            return {"id": "r", "choices": [choice], "usage": None, **more}

        frames = body.get("diffusion", {}).get("frames")
        steps = how.get("steps", len(words))
        order = list(range(len(words)))[::-1]
        for step in range(steps):
            if step >= how.get("cut", 1 << 30):
                return False
            if "break_at" in how and step == how["break_at"]:
                send({"error": {"message": "it broke", "code": "request_failed"}})
                break
            share = order[step * len(order) // steps:(step + 1) * len(order) // steps]
            if frames:
                send(chunk(diffusion={"step": step + 1, "canvas_tokens": len(words), "block": [0, len(words)],
                                      "positions": sorted(share), "tokens": sorted(share),
                                      "texts": [words[i] for i in sorted(share)],
                                      "confidence": [0.9] * len(share), "final_end": 0}))
            elif step == steps - 1:
                send(chunk(text))
            else:
                writer.write(b"e\r\n: keep-alive\n\n\r\n")
            await writer.drain()
            if how.get("step_delay"):
                await asyncio.sleep(how["step_delay"])
        else:
            if frames:
                send(chunk(text))
            last = chunk()
            last["choices"][0]["finish_reason"] = "stop"
            send(last)
            send({"id": "r", "choices": [], "usage": usage})
        send("[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return how.get("keep", True)

    @staticmethod
    def _reply(writer, status, body, headers=None):
        data = json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} Whatever", "Content-Type: application/json", f"Content-Length: {len(data)}",
                 "x-request-id: req-1"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + data)
