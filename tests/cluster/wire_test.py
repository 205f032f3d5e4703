"""The HTTP surface byte by byte: raw sockets against a real gateway. Malformed requests with the exact answer to
each, framing of streams, pipelining, clients that are slow at writing and at reading, and a counter for every limit.

Run by ctest; alone: python3 tests/cluster/wire_test.py
"""
import json
import re
import socket
import struct
import sys
import threading
import time
import unittest

from cluster import Cluster, get, post

MODEL = "cinnabar-tiny"
CONNECTIONS_MAX = 40
BODY_MAX = 64 << 10
INVALID = "invalid_request_error"


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def error(self):
        return json.loads(self.body)["error"]


class Wire:
    """One connection that sends exactly what it is told."""

    def __init__(self, port, receive_buffer=None):
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(30)
        self.socket.connect(("127.0.0.1", port))
        self.buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has been refused already: the answer says how
        return self

    def more(self):
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            data = b""
        self.buffer += data
        return bool(data)

    def until(self, mark):
        while mark not in self.buffer:
            if not self.more():
                raise EOFError(f"the connection ended; what came: {self.buffer[:300]!r}")
        head, self.buffer = self.buffer.split(mark, 1)
        return head

    def exactly(self, size):
        while len(self.buffer) < size:
            if not self.more():
                raise EOFError(f"the connection ended after {len(self.buffer)} of {size} bytes")
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def head(self):
        lines = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 (\d{3}) [ -~]+", lines[0])
        assert match, lines[0]
        headers = {}
        for line in lines[1:]:
            name, value = line.split(": ", 1)
            assert name.lower() not in headers, f"{name} twice"
            headers[name.lower()] = value
        return int(match[1]), headers

    def chunk(self):
        size = int(self.until(b"\r\n"), 16)
        data = self.exactly(size)
        assert self.exactly(2) == b"\r\n"
        return data

    def reply(self):
        status, headers = self.head()
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join(iter(self.chunk, b""))
        else:
            body = self.exactly(int(headers.get("content-length", 0)))
        return Reply(status, headers, body)

    def at_end(self):
        """Whether the server closes, and says nothing more."""
        while self.more():
            pass
        return self.buffer == b""


def head(line, *headers, host="Host: a"):
    return "\r\n".join([line, *([host] if host else []), *headers, "", ""]).encode("latin-1")


def request(path, body, *headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(f"POST {path} HTTP/1.1", "Content-Type: application/json", f"Content-Length: {len(body)}",
                *headers) + body


def chunked(data):
    return head("POST /v1/completions HTTP/1.1", "Transfer-Encoding: chunked") + data


# What is refused before anybody looks at the URL: name, bytes, status, code. The connection is closed behind it.
FRAMING = [
    ("CL and TE", head("POST / HTTP/1.1", "Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    ("TE and CL", head("POST / HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 4") + b"0\r\n\r\n", 400),
    ("two lengths", head("POST / HTTP/1.1", "Content-Length: 4", "Content-Length: 5") + b"abcde", 400),
    ("two equal lengths", head("POST / HTTP/1.1", "Content-Length: 4", "Content-Length: 4") + b"abcd", 400),
    ("a list of lengths", head("POST / HTTP/1.1", "Content-Length: 4, 4") + b"abcd", 400),
    ("length with a sign", head("POST / HTTP/1.1", "Content-Length: +4") + b"abcd", 400),
    ("negative length", head("POST / HTTP/1.1", "Content-Length: -1"), 400),
    ("length in hex", head("POST / HTTP/1.1", "Content-Length: 0x4") + b"abcd", 400),
    ("empty length", head("POST / HTTP/1.1", "Content-Length:"), 400),
    ("huge length", head("POST / HTTP/1.1", "Content-Length: 18446744073709551616"), 400),
    ("two TEs", head("POST / HTTP/1.1", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400),
    ("TE in 1.0", head("POST / HTTP/1.0", "Transfer-Encoding: chunked"), 400),
    ("TE hidden by a blank", head("POST / HTTP/1.1", "Transfer-Encoding : chunked"), 400),
    ("TE hidden by a tab", head("POST / HTTP/1.1", "Transfer-Encoding\t: chunked"), 400),
    ("TE hidden by VT", head("POST / HTTP/1.1", "Transfer-Encoding: \x0bchunked"), 400),
    ("TE folded", head("POST / HTTP/1.1", "Transfer-Encoding:\r\n chunked"), 400),
    ("TE behind a bare CR", head("POST / HTTP/1.1", "X: a\rTransfer-Encoding: chunked"), 400),
    ("TE behind a bare LF", head("POST / HTTP/1.1", "X: a\nTransfer-Encoding: chunked"), 400),
    ("folded header", head("GET / HTTP/1.1", "X: a", " b"), 400),
    ("folded with a tab", head("GET / HTTP/1.1", "X: a", "\tb"), 400),
    ("fold before any header", head("GET / HTTP/1.1", host=" Host: a"), 400),
    ("bare LF everywhere", b"GET / HTTP/1.1\nHost: a\n\n", 400),
    ("bare LF at the end", b"GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
    ("bare LF in front", b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("bare CR as a line end", b"GET / HTTP/1.1\rHost: a\r\n\r\n", 400),
    ("NUL in a value", head("GET / HTTP/1.1", "X: a\x00b"), 400),
    ("NUL in a name", head("GET / HTTP/1.1", "X\x00: a"), 400),
    ("NUL in the URL", head("GET /\x00 HTTP/1.1"), 400),
    ("escape in a value", head("GET / HTTP/1.1", "X: \x1b[31m"), 400),
    ("DEL in a value", head("GET / HTTP/1.1", "X: \x7f"), 400),
    ("no colon", head("GET / HTTP/1.1", "nonsense"), 400),
    ("no name", head("GET / HTTP/1.1", ": x"), 400),
    ("blank in a name", head("GET / HTTP/1.1", "a b: x"), 400),
    ("Latin letter in a name", head("GET / HTTP/1.1", "n\xe4me: x"), 400),
    ("no host", head("GET / HTTP/1.1", host=""), 400),
    ("two hosts", head("GET / HTTP/1.1", "Host: b"), 400),
    ("host with a user", head("GET / HTTP/1.1", host="Host: u@a"), 400),
    ("host with a path", head("GET / HTTP/1.1", host="Host: a/b"), 400),
    ("no version", head("GET /"), 400),
    ("version without a minor", head("GET / HTTP/1"), 400),
    ("long version", head("GET / HTTP/1.01"), 400),
    ("small letters", head("GET / http/1.1"), 400),
    ("no method", head(" / HTTP/1.1"), 400),
    ("method of brackets", head("<GET> / HTTP/1.1"), 400),
    ("long method", head("G" * 40 + " / HTTP/1.1"), 400),
    ("blank in the URL", head("GET /a b HTTP/1.1"), 400),
    ("two blanks", head("GET  / HTTP/1.1"), 400),
    ("tab for a blank", head("GET\t/ HTTP/1.1"), 400),
    ("relative URL", head("GET v1/models HTTP/1.1"), 400),
    ("authority for a URL", head("CONNECT a:443 HTTP/1.1"), 400),
    ("another scheme", head("GET file:///etc/passwd HTTP/1.1"), 400),
    ("fragment", head("GET /v1/models#x HTTP/1.1"), 400),
    ("broken escape", head("GET /%zz HTTP/1.1"), 400),
    ("escape that ends", head("GET /%4 HTTP/1.1"), 400),
    ("escaped NUL", head("GET /a%00 HTTP/1.1"), 400),
    ("escaped line end", head("GET /a%0d%0aX:%20b HTTP/1.1"), 400),
    ("raw UTF-8 in the URL", head("GET /\xc3\xa9 HTTP/1.1"), 400),
    ("TLS to a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ("not HTTP", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400),
    ("chunk without a size", chunked(b"\r\nabc\r\n0\r\n\r\n"), 400),
    ("chunk of no number", chunked(b"zz\r\nabc\r\n0\r\n\r\n"), 400),
    ("negative chunk", chunked(b"-1\r\nabc\r\n0\r\n\r\n"), 400),
    ("chunk with 0x", chunked(b"0x3\r\nabc\r\n0\r\n\r\n"), 400),
    ("chunk over 64 bits", chunked(b"10000000000000003\r\nabc\r\n0\r\n\r\n"), 400),
    ("chunk too short", chunked(b"5\r\nabc\r\n0\r\n\r\n0\r\n\r\n"), 400),
    ("chunk too long", chunked(b"2\r\nabc\r\n0\r\n\r\n"), 400),
    ("chunk without an end", chunked(b"3\r\nabc0\r\n\r\n"), 400),
    ("broken trailer", chunked(b"0\r\nno colon\r\n\r\n"), 400),
    ("endless extension", chunked(b"3;" + b"x" * 9000), 400),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http_version_not_supported"),
    ("HTTP/3", head("GET / HTTP/3.0"), 505, "http_version_not_supported"),
    ("HTTP/0.9", head("GET / HTTP/0.9"), 505, "http_version_not_supported"),
    ("TE gzip", head("POST / HTTP/1.1", "Transfer-Encoding: gzip, chunked"), 501, "not_implemented"),
    ("TE behind chunked", head("POST / HTTP/1.1", "Transfer-Encoding: chunked, identity"), 501, "not_implemented"),
    ("TE nearly chunked", head("POST / HTTP/1.1", "Transfer-Encoding: xchunked"), 501, "not_implemented"),
    ("gzip bomb", head("POST /v1/completions HTTP/1.1", "Content-Encoding: gzip", "Content-Length: 4") + b"\x1f\x8b\0\0",
     415, "unsupported_media_type"),
    ("expects magic", head("POST / HTTP/1.1", "Expect: magic", "Content-Length: 1"), 417, "expectation_failed"),
    ("long URL", head("GET /" + "a" * 9000 + " HTTP/1.1"), 414, "url_too_long"),
    ("long header", head("GET / HTTP/1.1", "X: " + "a" * 20000), 431, "headers_too_large"),
    ("head without an end", b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 4000, 431, "headers_too_large"),
    ("many headers", head("GET / HTTP/1.1", *[f"X{i}: a" for i in range(70)]), 431, "headers_too_large"),
    ("large length", head("POST /v1/completions HTTP/1.1", f"Content-Length: {BODY_MAX + 1}"), 413, "request_too_large"),
    ("large chunks", chunked(b"".join(b"4000\r\n" + b"x" * 0x4000 + b"\r\n" for _ in range(5))), 413,
     "request_too_large"),
]

COMPLETION, CHAT, FIM = "/v1/completions", "/v1/chat/completions", "/v1/fim/completions"
GOOD = {"model": MODEL, "prompt": "def f(", "max_tokens": 4}
GOOD_CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def with_fields(**fields):
    return {**GOOD, **fields}


def raw(text):
    """A body around text that json.dumps would not write."""
    return b'{"model":"cinnabar-tiny","max_tokens":4,' + (text if isinstance(text, bytes) else text.encode()) + b"}"


def messages(*items):
    return {**GOOD_CHAT, "messages": list(items)}


def diffusion(**fields):
    return {**GOOD, "diffusion": fields}


# What is no JSON object of ours: all 400 invalid_json. Name, body.
NOT_JSON = [
    ("nothing", b""), ("null", b"null"), ("an array", b"[]"), ("a string", b'"x"'), ("a number", b"1"),
    ("half an object", b'{"model":'), ("no value", b'{"model":}'), ("trailing comma", raw('"prompt":"x",')),
    ("garbage behind", raw('"prompt":"x"') + b"x"), ("two objects", raw('"prompt":"x"') * 2),
    ("single quotes", b"{'model':'x'}"), ("a comment", raw('"prompt":"x"/* */')), ("a bare key", b"{model:1}"),
    ("NaN", raw('"prompt":"x","temperature":NaN')), ("Infinity", raw('"prompt":"x","temperature":Infinity')),
    ("1e999", raw('"prompt":"x","temperature":1e999')), ("leading zero", raw('"prompt":"x","n":01')),
    ("leading plus", raw('"prompt":"x","n":+1')), ("hex", raw('"prompt":"x","n":0x1')),
    ("a point without digits", raw('"prompt":"x","top_p":1.')), ("UTF-16", '{"model":1}'.encode("utf-16")),
    ("a stray byte", raw(b'"prompt":"\xff"')), ("overlong UTF-8", raw(b'"prompt":"\xc0\xaf"')),
    ("cut UTF-8", raw(b'"prompt":"\xe2\x82"')), ("surrogate bytes", raw(b'"prompt":"\xed\xa0\x80"')),
    ("beyond Unicode", raw(b'"prompt":"\xf5\x80\x80\x80"')), ("a lone high surrogate", raw(r'"prompt":"\ud800"')),
    ("a lone low surrogate", raw(r'"prompt":"\udc00x"')), ("surrogates swapped", raw(r'"prompt":"\udc00\ud800"')),
    ("a raw line end", raw('"prompt":"a\nb"')), ("a raw NUL", raw(b'"prompt":"a\0b"')), ("a bad escape", raw(r'"prompt":"\x41"')),
    ("an open string", raw('"prompt":"x')), ("a key twice", raw('"prompt":"x","prompt":"y"')),
    ("a key twice inside", raw('"prompt":"x","diffusion":{"steps":1,"steps":2}')),
    ("a key twice by escape", raw(r'"prompt":"x","pr\u006fmpt":"y"')), ("33 deep", raw('"prompt":"x","a":' + "[" * 32 + "]" * 32)),
    ("30,000 deep", b"[" * 30000), ("30,000 objects deep", b'{"a":' * 10000),
]

# A JSON object that is no request: name, path, body, code, param. Status 400.
WRONG = [
    ("no model", COMPLETION, {"prompt": "x"}, "missing_required_parameter", "model"),
    ("null model", COMPLETION, with_fields(model=None), "missing_required_parameter", "model"),
    ("empty model", COMPLETION, with_fields(model=""), "missing_required_parameter", "model"),
    ("model 5", COMPLETION, with_fields(model=5), "invalid_type", "model"),
    ("long model", COMPLETION, with_fields(model="m" * 300), "invalid_value", "model"),
    ("no prompt", COMPLETION, {"model": MODEL}, "missing_required_parameter", "prompt"),
    ("prompt 5", COMPLETION, with_fields(prompt=5), "invalid_type", "prompt"),
    ("prompt object", COMPLETION, with_fields(prompt={}), "invalid_type", "prompt"),
    ("prompt []", COMPLETION, with_fields(prompt=[]), "invalid_value", "prompt"),
    ("prompts and ids", COMPLETION, with_fields(prompt=["a", 1]), "invalid_type", "prompt[1]"),
    ("ids and prompts", COMPLETION, with_fields(prompt=[1, "a"]), "invalid_type", "prompt[1]"),
    ("half an id", COMPLETION, with_fields(prompt=[1.5]), "invalid_type", "prompt[0]"),
    ("negative id", COMPLETION, with_fields(prompt=[5, -1]), "invalid_value", "prompt[1]"),
    ("huge id", COMPLETION, with_fields(prompt=[2**40]), "invalid_value", "prompt[0]"),
    ("id beyond the vocabulary", COMPLETION, with_fields(prompt=[10**6]), "invalid_value", "prompt"),
    ("17 prompts", COMPLETION, with_fields(prompt=["a"] * 17), "invalid_value", "prompt"),
    ("suffix 5", COMPLETION, with_fields(suffix=5), "invalid_type", "suffix"),
    ("max_tokens text", COMPLETION, with_fields(max_tokens="4"), "invalid_type", "max_tokens"),
    ("max_tokens true", COMPLETION, with_fields(max_tokens=True), "invalid_type", "max_tokens"),
    ("max_tokens 4.5", COMPLETION, with_fields(max_tokens=4.5), "invalid_type", "max_tokens"),
    ("max_tokens 0", COMPLETION, with_fields(max_tokens=0), "invalid_value", "max_tokens"),
    ("max_tokens -1", COMPLETION, with_fields(max_tokens=-1), "invalid_value", "max_tokens"),
    ("max_tokens 2^63", COMPLETION, with_fields(max_tokens=2**63), "invalid_value", "max_tokens"),
    ("max_tokens 2^64", COMPLETION, with_fields(max_tokens=2**64), "invalid_type", "max_tokens"),
    ("max_tokens of 300 digits", COMPLETION, raw('"prompt":"x","n":1' + "0" * 300), "invalid_type", "n"),
    ("two lengths", COMPLETION, with_fields(max_completion_tokens=5), "invalid_value", "max_completion_tokens"),
    ("n 0", COMPLETION, with_fields(n=0), "invalid_value", "n"),
    ("n 17", COMPLETION, with_fields(n=17), "invalid_value", "n"),
    ("n text", COMPLETION, with_fields(n="1"), "invalid_type", "n"),
    ("n times prompts", COMPLETION, with_fields(n=9, prompt=["a", "b"]), "invalid_value", "n"),
    ("best_of", COMPLETION, with_fields(best_of=2), "unsupported_parameter", "best_of"),
    ("temperature text", COMPLETION, with_fields(temperature="hot"), "invalid_type", "temperature"),
    ("temperature -1", COMPLETION, with_fields(temperature=-0.1), "invalid_value", "temperature"),
    ("temperature 2.1", COMPLETION, with_fields(temperature=2.1), "invalid_value", "temperature"),
    ("temperature 1e308", COMPLETION, with_fields(temperature=1e308), "invalid_value", "temperature"),
    ("top_p 0", COMPLETION, with_fields(top_p=0), "invalid_value", "top_p"),
    ("top_p 1.1", COMPLETION, with_fields(top_p=1.1), "invalid_value", "top_p"),
    ("top_p []", COMPLETION, with_fields(top_p=[]), "invalid_type", "top_p"),
    ("top_k -2", COMPLETION, with_fields(top_k=-2), "invalid_value", "top_k"),
    ("top_k 1.5", COMPLETION, with_fields(top_k=1.5), "invalid_type", "top_k"),
    ("seed 1.5", COMPLETION, with_fields(seed=1.5), "invalid_type", "seed"),
    ("seed 2^64", COMPLETION, with_fields(seed=2**64), "invalid_type", "seed"),
    ("seed text", COMPLETION, with_fields(seed="7"), "invalid_type", "seed"),
    ("frequency_penalty 3", COMPLETION, with_fields(frequency_penalty=3), "invalid_value", "frequency_penalty"),
    ("min_p text", COMPLETION, with_fields(min_p="x"), "invalid_type", "min_p"),
    ("stop 5", COMPLETION, with_fields(stop=5), "invalid_type", "stop"),
    ("stop [5]", COMPLETION, with_fields(stop=[5]), "invalid_type", "stop[0]"),
    ("five stops", COMPLETION, with_fields(stop=list("abcde")), "invalid_value", "stop"),
    ("empty stop", COMPLETION, with_fields(stop=["a", ""]), "invalid_value", "stop[1]"),
    ("long stop", COMPLETION, with_fields(stop="s" * 300), "invalid_value", "stop"),
    ("stream text", COMPLETION, with_fields(stream="yes"), "invalid_type", "stream"),
    ("stream 1", COMPLETION, with_fields(stream=1), "invalid_type", "stream"),
    ("stream_options 5", COMPLETION, with_fields(stream_options=5), "invalid_type", "stream_options"),
    ("include_usage 1", COMPLETION, with_fields(stream_options={"include_usage": 1}), "invalid_type",
     "stream_options.include_usage"),
    ("diffusing text", COMPLETION, with_fields(diffusing="x"), "invalid_type", "diffusing"),
    ("echo 1", COMPLETION, with_fields(echo=1), "invalid_type", "echo"),
    ("logprobs", COMPLETION, with_fields(logprobs=0), "unsupported_parameter", "logprobs"),
    ("logit_bias", COMPLETION, with_fields(logit_bias={"5": 1}), "unsupported_parameter", "logit_bias"),
    ("service_tier gold", COMPLETION, with_fields(service_tier="gold"), "invalid_value", "service_tier"),
    ("priority urgent", COMPLETION, with_fields(priority="urgent"), "invalid_value", "priority"),
    ("priority 1", COMPLETION, with_fields(priority=1), "invalid_type", "priority"),
    ("extra_body 5", COMPLETION, with_fields(extra_body=5), "invalid_type", "extra_body"),
    ("extra_body again", COMPLETION, with_fields(extra_body={"max_tokens": 5}), "invalid_value", "extra_body.max_tokens"),
    ("diffusion 5", COMPLETION, with_fields(diffusion=5), "invalid_type", "diffusion"),
    ("diffusion []", COMPLETION, with_fields(diffusion=[]), "invalid_type", "diffusion"),
    ("unknown sampler", COMPLETION, diffusion(sampler="magic"), "invalid_value", "diffusion.sampler"),
    ("sampler 5", COMPLETION, diffusion(sampler=5), "invalid_type", "diffusion.sampler"),
    ("long sampler", COMPLETION, diffusion(sampler="s" * 10000), "invalid_value", "diffusion.sampler"),
    ("steps 0", COMPLETION, diffusion(steps=0), "invalid_value", "diffusion.steps"),
    ("steps text", COMPLETION, diffusion(steps="8"), "invalid_type", "diffusion.steps"),
    ("steps 1.5", COMPLETION, diffusion(steps=1.5), "invalid_type", "diffusion.steps"),
    ("steps 65537", COMPLETION, diffusion(steps=65537), "invalid_value", "diffusion.steps"),
    ("block_length 0", COMPLETION, diffusion(block_length=0), "invalid_value", "diffusion.block_length"),
    ("threshold 2", COMPLETION, diffusion(threshold=2), "invalid_value", "diffusion.threshold"),
    ("threshold null-ish", COMPLETION, diffusion(threshold=""), "invalid_type", "diffusion.threshold"),
    ("factor 0", COMPLETION, diffusion(factor=0), "invalid_value", "diffusion.factor"),
    ("entropy_bound -1", COMPLETION, diffusion(entropy_bound=-1), "invalid_value", "diffusion.entropy_bound"),
    ("alg_temp -1", COMPLETION, diffusion(alg_temp=-1), "invalid_value", "diffusion.alg_temp"),
    ("eps 0", COMPLETION, diffusion(eps=0), "invalid_value", "diffusion.eps"),
    ("cfg_scale -1", COMPLETION, diffusion(cfg_scale=-1), "invalid_value", "diffusion.cfg_scale"),
    ("cfg_scale 1e300", COMPLETION, diffusion(cfg_scale=1e300), "invalid_value", "diffusion.cfg_scale"),
    ("eos_penalty text", COMPLETION, diffusion(eos_penalty="x"), "invalid_type", "diffusion.eos_penalty"),
    ("logits_eos_inf 1", COMPLETION, diffusion(logits_eos_inf=1), "invalid_type", "diffusion.logits_eos_inf"),
    ("eos_eot text", COMPLETION, diffusion(confidence_eos_eot_inf="x"), "invalid_type",
     "diffusion.confidence_eos_eot_inf"),
    ("may_degrade 1", COMPLETION, diffusion(may_degrade=1), "invalid_type", "diffusion.may_degrade"),
    ("frames 1", COMPLETION, diffusion(frames=1), "invalid_type", "diffusion.frames"),
    ("steps_min above steps", COMPLETION, diffusion(steps=4, steps_min=5), "invalid_value", "diffusion.steps_min"),
    ("steps_min, not to degrade", COMPLETION, diffusion(steps_min=2, may_degrade=False), "invalid_value",
     "diffusion.steps_min"),
    ("deadline 0", COMPLETION, diffusion(deadline_seconds=0), "invalid_value", "diffusion.deadline_seconds"),
    ("deadline of a year", COMPLETION, diffusion(deadline_seconds=3e7), "invalid_value", "diffusion.deadline_seconds"),
    ("canvas above max_tokens", COMPLETION, diffusion(canvas_tokens=5), "invalid_value", "diffusion.canvas_tokens"),
    ("a misspelt knob", COMPLETION, diffusion(stepz=4), "unknown_parameter", "diffusion.stepz"),
    ("a misplaced knob", COMPLETION, diffusion(temperature=1), "unknown_parameter", "diffusion.temperature"),
    ("a prompt that is too long", COMPLETION, with_fields(prompt="x y " * 4000), "context_length_exceeded", "prompt"),
    ("an answer that is too long", COMPLETION, with_fields(max_tokens=100000), None, "max_tokens"),
    ("no messages", CHAT, {"model": MODEL}, "missing_required_parameter", "messages"),
    ("messages []", CHAT, messages(), "missing_required_parameter", "messages"),
    ("messages object", CHAT, {**GOOD_CHAT, "messages": {}}, "invalid_type", "messages"),
    ("message text", CHAT, messages("hi"), "invalid_type", "messages[0]"),
    ("no role", CHAT, messages({"content": "x"}), "missing_required_parameter", "messages[0].role"),
    ("unknown role", CHAT, messages({"role": "king", "content": "x"}), "invalid_value", "messages[0].role"),
    ("no content", CHAT, messages({"role": "user"}), "missing_required_parameter", "messages[0].content"),
    ("content 5", CHAT, messages({"role": "user", "content": 5}), "invalid_type", "messages[0].content"),
    ("an image", CHAT, messages({"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]}), "unsupported_parameter",
     "messages[0].content[0].type"),
    ("a part without text", CHAT, messages({"role": "user", "content": [{"type": "text"}]}),
     "missing_required_parameter", "messages[0].content[0].text"),
    ("audio", CHAT, {**GOOD_CHAT, "audio": {"voice": "a"}}, "unsupported_parameter", "audio"),
    ("tools", CHAT, {**GOOD_CHAT, "tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
    ("JSON mode", CHAT, {**GOOD_CHAT, "response_format": {"type": "json_object"}}, "unsupported_parameter",
     "response_format"),
    ("echo of a chat", CHAT, {**GOOD_CHAT, "echo": True}, "unsupported_parameter", "echo"),
    ("FIM of several", FIM, with_fields(prompt=["a", "b"]), "invalid_type", "prompt"),
    ("FIM without a prompt", FIM, {"model": MODEL, "suffix": "x"}, "missing_required_parameter", "prompt"),
]


def http_events(port):
    """Counter of what the HTTP server met, by event."""
    text = get(port, "/metrics")[1].decode()
    return {name: float(value)
            for name, value in re.findall(r'^cinnabar_http_events_total\{event="(\w+)"\} (\S+)$', text, re.M)}


def requests_total(port, outcome):
    text = get(port, "/metrics")[1].decode()
    return sum(float(value) for value in re.findall(
        rf'^cinnabar_gateway_requests_total\{{[^}}]*outcome="{outcome}"[^}}]*\}} (\S+)$', text, re.M))


class WireTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(workers=1, gateway_args=[
            "--header-seconds", "2", "--body-seconds", "6", "--write-seconds", "10",
            "--connections-max", str(CONNECTIONS_MAX), "--body-kib", str(BODY_MAX >> 10)])
        cls.cluster.__enter__()
        cls.cluster.wait_ready()
        cls.port = cls.cluster.gateway_ports[0]

    @classmethod
    def tearDownClass(cls):
        alive = [process.name for process in cls.cluster.processes() if not process.alive()]
        cls.cluster.stop()
        assert not alive, f"{alive} did not live through it"

    def tearDown(self):
        # Whatever a test did, the next client is served.
        self.assertEqual(get(self.port, "/healthz")[0], 200)
        status, reply, _ = post(self.port, COMPLETION, GOOD)
        self.assertEqual(status, 200, reply)

    def check_error(self, reply, status, code, param, kind=INVALID):
        self.assertEqual(reply.status, status, reply.body)
        self.assertRegex(reply.headers["x-request-id"], r"^req_[0-9a-f]{32}$")
        self.assertEqual(reply.headers["content-type"], "application/json")
        error = reply.error()
        self.assertEqual(set(error), {"message", "type", "param", "code"})
        self.assertEqual((error["type"], error["code"], error["param"]), (kind, code, param), error["message"])
        self.assertGreater(len(error["message"]), 5)

    def test_there_are_enough(self):
        self.assertGreaterEqual(len(FRAMING) + len(NOT_JSON) + len(WRONG), 60)
        for cases in (FRAMING, NOT_JSON, WRONG):
            self.assertEqual(len({case[0] for case in cases}), len(cases))
        bodies = [case[1] for case in FRAMING + NOT_JSON] + [json.dumps(case[1:3], default=repr) for case in WRONG]
        self.assertEqual(len(set(bodies)), len(bodies))

    def test_broken_framing_is_refused_and_closed(self):
        before = http_events(self.port)
        want = {"malformed": 0, "too_large": 0}
        ids = set()
        for name, data, status, *code in FRAMING:
            with self.subTest(name), Wire(self.port) as wire:
                reply = wire.send(data).reply()
                kind = "server_error" if status >= 500 else INVALID
                self.check_error(reply, status, code[0] if code else "bad_request", None, kind)
                self.assertEqual(reply.headers["connection"], "close")
                self.assertTrue(wire.at_end(), "more was said, or the connection stays")
                ids.add(reply.headers["x-request-id"])
                want["too_large" if status in (413, 414, 431) else "malformed"] += 1
        self.assertEqual(len(ids), len(FRAMING))
        after = http_events(self.port)
        for event, count in want.items():
            self.assertEqual(after[event] - before.get(event, 0), count, event)

    def test_what_is_no_json_is_refused_and_the_connection_stays(self):
        before = requests_total(self.port, "client_error")
        with Wire(self.port) as wire:
            for name, body in NOT_JSON:
                with self.subTest(name):
                    self.check_error(wire.send(request(COMPLETION, body)).reply(), 400, "invalid_json", None)
        self.assertEqual(requests_total(self.port, "client_error") - before, len(NOT_JSON))

    def test_wrong_fields_are_named(self):
        before = requests_total(self.port, "client_error")
        with Wire(self.port) as wire:
            for name, path, body, code, param in WRONG:
                with self.subTest(name):
                    reply = wire.send(request(path, body)).reply()
                    self.check_error(reply, 400, code or reply.error()["code"], param)
                    self.assertIn(param.split(".")[0].split("[")[0], reply.error()["message"] + param)
        self.assertEqual(requests_total(self.port, "client_error") - before, len(WRONG))

    def test_wrong_urls_methods_and_names(self):
        with Wire(self.port) as wire:
            def ask(data, *want, kind=INVALID):
                reply = wire.send(data).reply()
                self.check_error(reply, *want, kind)
                return reply
            ask(head("GET / HTTP/1.1"), 404, "not_found", None)
            ask(head("GET /v1/modelz HTTP/1.1"), 404, "not_found", None)
            ask(head("GET /v1/models/none HTTP/1.1"), 404, "model_not_found", "model")
            ask(head("GET /v1/models/%ff%fe HTTP/1.1"), 404, "model_not_found", "model")
            ask(head("GET /v1/models/../../etc/passwd HTTP/1.1"), 404, "model_not_found", "model")
            ask(head("GET /v1/completions HTTP/1.1"), 405, "method_not_allowed", None)
            ask(head("DELETE /v1/models HTTP/1.1"), 405, "method_not_allowed", None)
            ask(head("BREW /healthz HTTP/1.1"), 405, "method_not_allowed", None)
            ask(head("OPTIONS * HTTP/1.1"), 404, "not_found", None)
            ask(head("DELETE /v1/requests/req_0 HTTP/1.1"), 404, "not_found", None)
            ask(head("DELETE /v1/requests/a%20b%7b%7d HTTP/1.1"), 404, "not_found", None)
            ask(head("DELETE /v1/requests/" + "r" * 500 + " HTTP/1.1"), 404, "not_found", None)
            ask(request(COMPLETION, with_fields(model="no-such")), 404, "model_not_found", "model")
            ask(request(COMPLETION, with_fields(model="../" * 50)), 404, "model_not_found", "model")
            for wrong in ("x", "req_1", "req_1:", "req_1:-1", "req_1:1,1", ":" * 100, "req_1:99999999999", "r{x}*:1",
                          "r" * 61 + ":1"):
                ask(request(COMPLETION, GOOD, f"Last-Event-ID: {wrong}"), 400, "invalid_value", "Last-Event-ID")
            ask(request(COMPLETION, GOOD, "Last-Event-ID: req_1:1"), 404, "not_found", None)

    def test_oddities_that_are_fine(self):
        with Wire(self.port) as wire:
            for body in (with_fields(unknown_field={"a": 1}), with_fields(user="u", metadata={}),
                         with_fields(prompt="\0\x1b\ud83d\ude00\uffff"), with_fields(seed=-1), with_fields(top_k=-1),
                         with_fields(stop=None, n=None, stream=None), with_fields(prompt="")):
                self.assertEqual(wire.send(request(COMPLETION, body)).reply().status, 200, body)
            size = len(json.dumps(GOOD).encode())
            padded = json.dumps(GOOD).encode() + b" " * (BODY_MAX - size)
            self.assertEqual(wire.send(request(COMPLETION, padded)).reply().status, 200)
            body = json.dumps(GOOD).encode()
            for pieces in (1, 7, len(body)):
                data = b"".join(b"%x;ext=\"a b\"\r\n%b\r\n" % (len(piece), piece) for piece in
                                (body[i:i + pieces] for i in range(0, len(body), pieces)))
                self.assertEqual(wire.send(chunked(data + b"0\r\nX-Trailer: 1\r\n\r\n")).reply().status, 200)
            self.assertEqual(wire.send(head("GET http://proxy.example/v1/models HTTP/1.1")).reply().status, 200)
            self.assertEqual(wire.send(head("GET /v1/%6dodels?x=1 HTTP/1.1")).reply().status, 200)

    def test_pipelined_requests_are_answered_in_order(self):
        with Wire(self.port) as wire:
            requests = []
            for i in range(10):
                requests += [request(COMPLETION, with_fields(n=1 + i % 3)), head("GET /healthz HTTP/1.1"),
                             request(COMPLETION, b"broken"), request(COMPLETION, with_fields(stream=True))]
            wire.send(b"".join(requests))
            for i in range(10):
                reply = wire.reply()
                self.assertEqual(len(json.loads(reply.body)["choices"]), 1 + i % 3)
                self.assertEqual(wire.reply().status, 200)
                self.assertEqual(wire.reply().error()["code"], "invalid_json")
                self.assertTrue(wire.reply().body.endswith(b"data: [DONE]\n\n"))
            # Behind a broken head nothing is served.
            wire.send(head("GET / HTTP/1.1", "X : y") + head("GET /healthz HTTP/1.1"))
            self.assertEqual(wire.reply().status, 400)
            self.assertTrue(wire.at_end())

    def test_a_stream_is_framed_as_events(self):
        for path, body in ((COMPLETION, with_fields(max_tokens=24, seed=3)),
                           (FIM, with_fields(max_tokens=16, suffix=")\n"))):
            with self.subTest(path), Wire(self.port) as wire:
                wire.send(request(path, {**body, "stream": True, "stream_options": {"include_usage": True}}))
                status, headers = wire.head()
                self.assertEqual(status, 200)
                self.assertEqual(headers["content-type"], "text/event-stream")
                self.assertEqual(headers["cache-control"], "no-store")
                self.assertEqual(headers["transfer-encoding"], "chunked")
                self.assertNotIn("content-length", headers)
                self.assertRegex(headers["x-request-id"], r"^req_[0-9a-f]{32}$")
                chunks = list(iter(wire.chunk, b""))
                # Every chunk holds whole events, so that a proxy that flushes by chunk splits none.
                for chunk in chunks:
                    self.assertTrue(chunk.endswith(b"\n\n"), chunk)
                events = b"".join(chunks).split(b"\n\n")[:-1]
                self.assertEqual(events[-1], b"data: [DONE]")
                ids, datas = [], []
                for event in events[:-1]:
                    for line in event.split(b"\n"):
                        self.assertRegex(line, rb"^(data: |id: |:)")
                        self.assertNotIn(b"\r", line)
                        if line.startswith(b"id: "):
                            ids.append(line[4:].decode())
                        if line.startswith(b"data: "):
                            datas.append(json.loads(line[6:]))
                self.assertEqual(len({data["id"] for data in datas}), 1)
                steps = [int(event_id.split(":")[1]) for event_id in ids]
                self.assertEqual(steps, sorted(steps))
                self.assertGreater(steps[-1], 0)
                self.assertEqual(datas[-1]["choices"], [])
                self.assertGreater(datas[-1]["usage"]["completion_tokens"], 0)
                reasons = [data["choices"][0]["finish_reason"] for data in datas[:-1]]
                self.assertIn(reasons[-1], ("stop", "length"))
                self.assertEqual(set(reasons[:-1]) - {None}, set())
                # The connection goes on behind the stream.
                self.assertEqual(wire.send(head("GET /healthz HTTP/1.1")).reply().status, 200)

    def test_an_old_client_streams_until_the_end(self):
        with Wire(self.port) as wire:
            body = json.dumps(with_fields(stream=True)).encode()
            wire.send(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            status, headers = wire.head()
            self.assertEqual((status, headers.get("transfer-encoding")), (200, None))
            while wire.more():
                pass
            self.assertTrue(wire.buffer.endswith(b"data: [DONE]\n\n"))

    def test_expect_continue(self):
        body = json.dumps(GOOD).encode()
        with Wire(self.port) as wire:
            wire.send(head("POST /v1/completions HTTP/1.1", f"Content-Length: {len(body)}", "Expect: 100-continue"))
            self.assertEqual(wire.head()[0], 100)
            self.assertEqual(wire.send(body).reply().status, 200)
            wire.send(head("POST /v1/completions HTTP/1.1", f"Content-Length: {BODY_MAX + 1}", "Expect: 100-continue"))
            self.assertEqual(wire.reply().status, 413)

    def test_a_client_that_leaves_cancels_its_work(self):
        before = requests_total(self.port, "cancelled")
        for stream in (True, False):
            with Wire(self.port) as wire:
                wire.send(request(COMPLETION, with_fields(max_tokens=150, stream=stream, diffusion={"steps": 150})))
                if stream:
                    wire.head()
                else:
                    time.sleep(0.05)
                wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end = time.monotonic() + 20
        while requests_total(self.port, "cancelled") < before + 2 and time.monotonic() < end:
            time.sleep(0.05)
        self.assertEqual(requests_total(self.port, "cancelled"), before + 2)
        text = get(self.port, "/metrics")[1].decode()
        self.assertIn('cinnabar_gateway_open_streams{proto="http"} 0', text)

    def test_connections_have_a_bound(self):
        before = http_events(self.port).get("connection_refused", 0)
        wires = []
        try:
            refused = None
            for _ in range(CONNECTIONS_MAX + 1):
                wires.append(Wire(self.port))
                wires[-1].send(head("GET /healthz HTTP/1.1"))
                reply = wires[-1].reply()
                if reply.status != 200:
                    refused = reply
                    break
            self.assertIsNotNone(refused)
            self.check_error(refused, 503, "server_overloaded", None, "server_error")
            self.assertEqual(refused.headers["retry-after"], "1")
            self.assertTrue(wires[-1].at_end())
        finally:
            for wire in wires:
                wire.socket.close()
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                if http_events(self.port)["connection_refused"] > before:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        self.assertGreater(http_events(self.port)["connection_refused"], before)

    def test_slow_clients(self):
        """All kinds at once, because each takes its time-out."""
        before = http_events(self.port)
        failures = []

        def dribble(start, piece, seconds, low, high):
            with Wire(self.port) as wire:
                begin = time.monotonic()
                wire.send(start)
                wire.socket.settimeout(0.25)
                while time.monotonic() < begin + seconds:
                    wire.send(piece)
                    try:
                        if not wire.more() or b"\r\n\r\n" in wire.buffer:
                            break
                    except socket.timeout:
                        pass
                took = time.monotonic() - begin
                wire.socket.settimeout(10)
                status, headers = wire.head()
                if status != 408 or headers["connection"] != "close" or not low < took < high:
                    failures.append((start[:20], status, took))

        def do_not_read():
            with Wire(self.port, receive_buffer=4096) as wire:
                wire.socket.settimeout(2)
                try:
                    # More than the kernel holds; the gateway must not hold it either.
                    for _ in range(2000):
                        wire.socket.sendall(head("GET /metrics HTTP/1.1") * 10)
                except (socket.timeout, ConnectionError):
                    pass
                time.sleep(15)

        long_head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX: "
        long_body = head("POST /v1/completions HTTP/1.1", "Content-Length: 60000")
        threads = [threading.Thread(target=dribble, args=arguments) for arguments in (
            (b"G", b"", 9, 1.5, 5), (long_head, b"x", 9, 1.5, 5), (b"", b"\r\n", 9, 1.5, 5),
            (long_body, b"x", 14, 5.5, 10), (chunked(b"ea60\r\n"), b"x", 14, 5.5, 10), (chunked(b"5"), b"", 14, 5.5, 10))]
        threads.append(threading.Thread(target=do_not_read))
        for thread in threads:
            thread.start()
        worst = 0
        while threads[-1].is_alive():  # meanwhile others are served as ever
            begin = time.monotonic()
            self.assertEqual(get(self.port, "/healthz")[0], 200)
            worst = max(worst, time.monotonic() - begin)
            time.sleep(0.2)
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])
        self.assertLess(worst, 2)
        after = http_events(self.port)
        self.assertEqual(after["timeout"] - before.get("timeout", 0), 6)
        self.assertEqual(after["slow_reader"] - before.get("slow_reader", 0), 1)

    def test_admission_limits_are_counted(self):
        """The queue's bounds, on a gateway of its own: one request of a class may wait, and little work is taken."""
        with Cluster(workers=1, gateway_args=["--token-steps-max", "3000"]) as cluster:
            cluster.wait_ready()
            port = cluster.gateway_ports[0]
            body = with_fields(max_tokens=128, diffusion={"steps": 128})
            status, reply, headers = post(port, COMPLETION, body)
            self.assertEqual((status, reply["error"]["code"]), (503, "server_overloaded"), reply)
            self.assertGreaterEqual(int(headers["retry-after"]), 1)
            self.assertRegex(get(port, "/metrics")[1].decode(),
                             r'cinnabar_admission_rejections_total\{[^}]*reason="server_overloaded"[^}]*\} 1')
            self.assertEqual(post(port, COMPLETION, GOOD)[0], 200)


if __name__ == "__main__":
    sys.exit(not unittest.main(verbosity=2, exit=False).result.wasSuccessful())
