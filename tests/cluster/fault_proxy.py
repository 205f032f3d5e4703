"""A TCP proxy on loopback that does to the traffic what networks do."""
import select
import socket
import struct
import threading
import time


class FaultProxy:
    """Every connection to `port` goes on to `target`. Faults concern all connections:
    pass; cut (connections are closed, new ones refused); blackhole (nothing arrives, nothing is closed); swallow_replies
    (requests arrive, replies vanish); delay (everything comes 50 ms late); reset (the
    connections of that moment end with a TCP reset). After a fault that swallowed bytes its connections are closed, as no TCP goes on from there."""

    def __init__(self, target):
        self.target = target
        self.mode = "pass"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.links = set()
        self.lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def set(self, mode):
        with self.lock:
            before, self.mode = self.mode, mode
            links = list(self.links)
        if mode == "reset":
            for link in links:
                self._reset(link)
        if mode == "cut" or before in ("blackhole", "swallow_replies"):
            for link in links:
                self._close(link)

    def _accept(self):
        while True:
            client, _ = self.listener.accept()
            if self.mode == "cut":
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target), 2)
            except OSError:
                client.close()
                continue
            link = (client, server)
            with self.lock:
                self.links.add(link)
            threading.Thread(target=self._pump, args=(link,), daemon=True).start()

    def _close(self, link):
        with self.lock:
            self.links.discard(link)
        for end in link:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _reset(self, link):
        for end in link:
            try:  # closing with unsent data thrown away is what sends RST
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass
        with self.lock:
            self.links.discard(link)
        for end in link:
            # Wakes its pump, which closes both ends: with the linger of zero that is a reset.
            try:
                end.shutdown(socket.SHUT_RD)
            except OSError:
                pass

    def _pump(self, link):
        client, server = link
        try:
            while True:
                for end in select.select([client, server], [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    if self.mode == "blackhole" or (self.mode == "swallow_replies" and end is server):
                        continue
                    if self.mode == "delay":
                        time.sleep(0.05)
                    (server if end is client else client).sendall(data)
        except OSError:
            pass
        finally:
            self._close(link)
            client.close()
            server.close()
