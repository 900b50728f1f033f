"""`make demo`: router, agent and a real vLLM on this machine, one question answered, then left running.

    python -m demo [--model FOLDER] [--state FOLDER]     DEMO_ONCE=1 ends after the answer

The state lives in `.demo`; a second run uses it again and takes no longer than the engine's own start.
"""

import argparse
import json
import os
import re
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from demo.engine import Engine, EngineUnusable, choose_engine
from demo.model.page import PAGE, read_page
from demo.prepare_engine import PreparationFailed
from demo.processes import Child, DemoFailed, Signals, StopRequested
from demo.progress import say, step
from demo.question import Answer, ask
from demo.state import Folder, write_private
from demo.system import (
    Run,
    register,
    spare_this_machine_the_proxy,
    start_agent,
    start_router,
    wait_for_agent,
    wait_for_router,
)

TINY = PAGE.with_name("xim-tiny").resolve()
OWN_QUESTION = "Say in one sentence what a language model is."
AGENT_GRACE_S, ROUTER_GRACE_S = 60.0, 30.0  # the agent lets streams finish and stops the engine before it ends
STOPPED_BY_SIGNAL = 130  # what a shell calls a program that Ctrl-C ended
_POLL_S = 0.5


def main() -> int:
    """0 when the demo answered and was stopped, or answered once; else 1, or 130 when stopped before its answer."""
    arguments = _arguments()
    signals = Signals()
    signals.install()
    try:
        return _demo(arguments.model, Folder(path=arguments.state.resolve()), signals)
    except (DemoFailed, EngineUnusable, PreparationFailed) as failure:
        say(f"error: {failure}")
        return 1
    except StopRequested:
        return STOPPED_BY_SIGNAL


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description="Run router, agent and vLLM here.")
    parser.add_argument(
        "--model", type=Path, default=TINY, help="folder of a model that vLLM can load (default: the tiny one)"
    )
    parser.add_argument(
        "--state", type=Path, default=Folder().path, metavar="FOLDER", help="database, keys and logs (default: .demo)"
    )
    return parser.parse_args()


def _demo(model: Path, folder: Folder, signals: Signals) -> int:
    started = time.monotonic()
    model = _model_folder(model)
    with folder.alone(), ExitStack() as stack:
        engine = choose_engine()
        say(f"vLLM {engine.version}: {engine.path}")
        run = Run(
            folder=folder,
            state=folder.settle_ports(folder.load()),
            model=model,
            endpoint=endpoint_slug(model.name),
            tiny=model == TINY,
            engine_socket=stack.enter_context(folder.engine_socket()),
        )
        children: list[Child] = []
        stack.callback(_stop, children, signals)
        run = _start(run, engine, signals, children)
        say(f"Ready after {time.monotonic() - started:.1f} s.")
        _show_answer(run)
        if os.environ.get("DEMO_ONCE", "") in ("", "0"):
            _serve(run, children)
    return 0


def _model_folder(model: Path) -> Path:
    folder = model.expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise DemoFailed(
            f"{folder} is not a model that vLLM can load: it must be a folder with a config.json, its weights and its "
            "tokenizer, as `save_pretrained` writes it. Usage: make demo MODEL=/path/to/folder"
        )
    return folder


def endpoint_slug(name: str) -> str:
    """What clients call the model: the folder's name in small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48].strip("-") or "model"


def _start(run: Run, engine: Engine, signals: Signals, children: list[Child]) -> Run:
    spare_this_machine_the_proxy()  # not sooner: what is fetched for the engine may need it
    with step("Project, API key and endpoint"):
        run = replace(run, state=register(run.folder, run.state, run.endpoint))
    run.folder.save(run.state)
    with signals.held():
        router = start_router(run)
        children.append(router)
    wait_for_router(router, run)
    with signals.held():
        agent = start_agent(run, engine)
        children.append(agent)
    wait_for_agent(agent, router, run)
    return run


def _show_answer(run: Run) -> None:
    entry = read_page()[0]
    question = entry.question if run.tiny else OWN_QUESTION
    sys.stdout.write(f"\n> {question}\n")
    answer = ask(run.base_url, run.state.api_key, run.endpoint, question)
    sys.stdout.write(f"\n{_timing(answer)}\n")
    sys.stdout.flush()
    if run.tiny and answer.text.strip() != entry.answer:
        raise DemoFailed(f"That is not the answer that the tiny model learned, which is: {entry.answer}")


def _timing(answer: Answer) -> str:
    tokens = "" if answer.tokens is None else f", {answer.tokens} tokens"
    return f"time to first token {answer.ttft_s * 1000:.0f} ms, whole answer {answer.total_s * 1000:.0f} ms{tokens}"


def _serve(run: Run, children: list[Child]) -> None:
    """Say how to use it, and stay until somebody asks to stop.

    Raises: DemoFailed when router or agent ends by itself.
    """
    write_private(
        run.folder.environment,
        f"export OPENAI_BASE_URL={run.base_url}\nexport OPENAI_API_KEY={run.state.api_key}\n",
    )
    sys.stdout.write(_instructions(run))
    sys.stdout.flush()
    try:
        while True:
            for child in children:
                child.require_alive()
            time.sleep(_POLL_S)
    except StopRequested:
        say("")


def _instructions(run: Run) -> str:
    request = {"model": run.endpoint, "stream": True, "messages": [{"role": "user", "content": "What is a lease?"}]}
    return f"""
XIM serves the model {run.endpoint!r} until you press Ctrl-C.

    base URL   {run.base_url}
    API key    {run.state.api_key}
    both as variables:   source {os.path.relpath(run.folder.environment)}

    curl -N {run.base_url}/chat/completions -H 'Authorization: Bearer {run.state.api_key}' \\
      -H 'Content-Type: application/json' -d '{json.dumps(request)}'

Logs: {os.path.relpath(run.folder.log("router"))}, {os.path.relpath(run.folder.log("agent"))}. Stop: Ctrl-C.
"""


def _stop(children: list[Child], signals: Signals) -> None:
    """The agent first, so that it can take its leave of the router; a second Ctrl-C kills what is left."""
    signals.shield()
    for child in reversed(children):
        with step(f"Stopping the {child.name}"):
            child.stop(AGENT_GRACE_S if child.name == "agent" else ROUTER_GRACE_S, signals.hurried)
