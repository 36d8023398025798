"""A `python` that has imported everything when it starts: what it runs is forked from one process.

For tests that need real processes (`make`, torchrun, what a shell would see), not Python's start: importing torch and
transformers takes several seconds of CPU each time. Hash seed, interpreter options and threads are those of the tests.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Run by a Python of its own that imports no package. It hands over what a process consists of, passes signals on, and
# ends as the program does; where it is killed, so is the program.
_CLIENT = """
import json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
facts = {"arguments": sys.argv[2:], "directory": os.getcwd(), "environment": dict(os.environ)}
request = json.dumps(facts).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
server.sendall(request)
code = int(server.makefile().read() or 1)
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def start_server(directory: Path) -> tuple[Path, BaseProcess]:
    """An executable for `-m MODULE ...` and `SCRIPT ...`, and the process that serves it, to be killed in the end.

    Args:
        directory: whose path is short, as a socket's address must be.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "socket"))
    listener.listen()
    server: BaseProcess = multiprocessing.get_context("forkserver").Process(target=_serve, args=(listener,))
    server.start()
    listener.close()
    (directory / "client.py").write_text(_CLIENT)
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{directory}/client.py" "{directory}/socket" "$@"\n')
    python.chmod(0o755)
    return python, server


def _serve(listener: socket.socket) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    programs: dict[socket.socket, BaseProcess] = {}
    while True:
        sentinels = {program.sentinel: client for client, program in programs.items()}
        for ready in wait([listener, parent.sentinel, *programs, *sentinels]):
            if ready == parent.sentinel:
                os._exit(0)
            if ready is listener:
                client, program = _start(listener)
                programs[client] = program
            elif ready in programs and (number := ready.recv(1)):
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(programs[ready].pid or 0, number[0])
            elif (client := sentinels.get(ready, ready)) in programs:  # the program has ended, or the client
                program = programs.pop(client)
                if client is ready:
                    program.kill()
                program.join()
                with client, suppress(OSError):  # nobody may be there to be told
                    client.sendall(str(program.exitcode).encode())


def _start(listener: socket.socket) -> tuple[socket.socket, BaseProcess]:
    client, _ = listener.accept()
    size, descriptors, _, _ = socket.recv_fds(client, 4, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += client.recv(2**16)
    program = multiprocessing.get_context("fork").Process(target=_run, args=(descriptors,), kwargs=json.loads(request))
    program.start()
    for descriptor in descriptors:
        os.close(descriptor)
    return client, program


def _run(descriptors: list[int], arguments: list[str], directory: str, environment: dict[str, str]) -> None:
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while arguments[0] == "-u":
        del arguments[0]
    run: Any = runpy.run_path
    if arguments[0] == "-m":
        run = runpy.run_module
        del arguments[0]
    sys.argv = arguments
    run(arguments[0], run_name="__main__", **({"alter_sys": True} if run is runpy.run_module else {}))
