"""Stands where `vllm` would stand and serves with another agent's engine: every byte goes to that one's socket.

For tests that need two agents, hence two tenants, on one real engine. BORROWED_ENGINE_SOCKET names the socket.
"""

import argparse
import asyncio
import os
import signal
import sys

STARTED = "INFO:     Application startup complete."


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection; when one side ends, so does the other."""
    far_reader, far_writer = await asyncio.open_unix_connection(os.environ["BORROWED_ENGINE_SOCKET"])
    pipes = [asyncio.create_task(pipe(reader, far_writer)), asyncio.create_task(pipe(far_reader, writer))]
    await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
    for each in (writer, far_writer):
        each.transport.abort()
    await asyncio.gather(*pipes, return_exceptions=True)


async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """One direction."""
    while data := await source.read(65_536):
        sink.write(data)
        await sink.drain()


async def serve(socket_path: str) -> None:
    """Forward until SIGTERM."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    server = await asyncio.start_unix_server(forward, socket_path)
    sys.stderr.write(f"{STARTED}\n")
    await stopped.wait()
    server.close()


def main() -> None:
    """Run as `vllm serve MODEL --uds PATH ...`; other flags are ignored."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--uds", required=True)
    args, _ = parser.parse_known_args()
    asyncio.run(serve(args.uds))


if __name__ == "__main__":
    main()
