"""A network that breaks: a TCP proxy on loopback that cuts connections after so many bytes."""

from __future__ import annotations

import socket
import struct
import threading

_RESET = struct.pack("ii", 1, 0)


class CuttingProxy:
    """The first connection is reset after `cut_after[0]` bytes from the server, the second after
    `cut_after[1]`, ...; further ones live. Runs while its `with` block does.

    With `silently` nothing passes any more and nobody is told, as when a cable is pulled.
    """

    def __init__(self, target: str, *, cut_after: list[int], silently: bool = False) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._cut_after = list(cut_after)
        self._silently = silently
        self._left = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self.num_cut = 0
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> CuttingProxy:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone would not wake who waits for it.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self._left.set()
        for each in self._sockets:
            _reset(each)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            limit = self._cut_after.pop(0) if self._cut_after else None
            self._spawn(self._pump, client, server, None)
            self._spawn(self._pump, server, client, limit)

    def _spawn(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        num_bytes = 0
        try:
            while data := source.recv(1 << 16):
                if limit is not None and num_bytes + len(data) > limit:
                    sink.sendall(data[: limit - num_bytes])
                    self.num_cut += 1
                    if self._silently:
                        self._left.wait()
                    break
                num_bytes += len(data)
                sink.sendall(data)
        except OSError:
            pass  # the other direction has ended it
        _reset(source)
        _reset(sink)


def _reset(connection: socket.socket) -> None:
    """As a machine that crashed and came back: what is under way is lost."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended already
