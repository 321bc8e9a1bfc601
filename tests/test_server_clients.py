"""The client of the library and the real server: what users write, over real sockets, from one process or several."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from server_process import ServerProcess
from test_server import same

import lenskit as lk
from lenskit.errors import JobCancelledError, NoSuchJobError, PlanFormatError

EIFFEL = "The Eiffel Tower is in the city of"
STREAM = "blocks.-1.hook_resid_post"


@pytest.fixture
def connection(server: ServerProcess, key: str) -> Iterator[Any]:
    with lk.connect(server.url, api_key=key) as found:
        yield found


def run(*arguments: object, **environment: str) -> str:
    """What a process of its own prints."""
    command = [sys.executable, *map(str, arguments)]
    found = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_client_and_the_server_are_one_library(
    connection: Any, demo_gpt2: lk.HookedTransformer, demo_llama: lk.HookedTransformer
) -> None:
    for local, name in ((demo_gpt2, "demo-gpt2"), (demo_llama, "demo-llama")):
        model = connection.model(name)
        logits, cache = model.run_with_cache(EIFFEL)
        expected, there = local.run_with_cache(EIFFEL)
        same(logits, expected)
        assert set(cache) == set(there)
        for point in there:
            same(cache[point], there[point])
        with model.trace(EIFFEL, max_new_tokens=2) as traced:
            value = model.blocks[1].output.t[-1].save()
        same(value.value, there["blocks.1.hook_resid_post"][:, -1])
        assert traced.texts == local.generate(EIFFEL, max_new_tokens=2).texts


def test_structure_of_ones_own_and_weights_of_the_servers(connection: Any, demo_gpt2: lk.HookedTransformer) -> None:
    model = lk.HookedTransformer.from_pretrained("demo-gpt2", device="meta", remote=connection)
    found, expected = (each.run_with_hooks(EIFFEL, [lk.Save(STREAM)]).saved[STREAM] for each in (model, demo_gpt2))
    same(found, expected)


def test_hidden_states_to_files(server: ServerProcess, key: str, tmp_path: Path) -> None:
    """A chat template, a prompt at a time, the last layer's states in a file each; there as here."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, ["Where is Nyhavn?", "Where is the Beehive?"])))
    command = ["-m", "lenskit", "extract", "demo-llama", "--prompts", prompts, "--system", "Answer in one word."]
    command += ["--max-new-tokens", 4, "--no-generation-prompt"]
    run(*command, "--out", tmp_path / "here")
    remote = {"LENSKIT_API_KEY": key}
    assert "2 new, 0 from before" in run(*command, "--out", tmp_path / "there", "--remote", server.url, **remote)
    assert "0 new, 2 from before" in run(*command, "--out", tmp_path / "there", "--remote", server.url, **remote)
    here, there = (tmp_path / name for name in ("here", "there"))
    assert (there / "texts.jsonl").read_text() == (here / "texts.jsonl").read_text()
    for number in range(2):
        found, expected = (load_file(folder / "states" / f"{number:05}.safetensors") for folder in (there, here))
        assert list(found) == list(expected) == ["blocks.3.hook_resid_post"]
        same(found["blocks.3.hook_resid_post"], expected["blocks.3.hook_resid_post"])


def test_a_job_is_collected_by_another_process(
    server: ServerProcess, key: str, connection: Any, demo_gpt2: lk.HookedTransformer
) -> None:
    job = connection.model("demo-gpt2", blocking=False).generate(EIFFEL, max_new_tokens=2, hooks=[lk.Save(STREAM)])
    program = "import sys, lenskit as lk; print(lk.connect().job(sys.argv[1]).result(60).texts[0])"
    said = run("-c", program, job.id, LENSKIT_URL=server.url, LENSKIT_API_KEY=key)
    assert said.strip() == demo_gpt2.generate(EIFFEL, max_new_tokens=2).texts[0]
    with lk.connect(server.url, api_key=server.key("somebody else")) as other:
        assert other.jobs() == []
        with pytest.raises(NoSuchJobError, match=job.id):
            other.job(job.id).result(60)
    assert [known.id for known in connection.jobs()].count(job.id) == 1
    job.delete()


def test_a_job_that_runs_is_cancelled(connection: Any) -> None:
    job = connection.model("demo-gpt2", blocking=False).generate(EIFFEL, max_new_tokens=200, eos_token_id=[])
    job.cancel()
    with pytest.raises(JobCancelledError):
        job.result(60)


def test_many_at_a_time_with_asyncio(server: ServerProcess, key: str, demo_gpt2: lk.HookedTransformer) -> None:
    texts = [EIFFEL, "Paris is", "Nyhavn lies in"] * 4

    async def continued() -> list[Any]:
        async with lk.connect_async(server.url, api_key=key) as there:
            model = await there.model("demo-gpt2")
            hooks = [[lk.Scale(f"blocks.{n % 4}.attn.hook_z", 0.5, heads=n % 8), lk.Save(STREAM)] for n in range(12)]
            asked = zip(texts, hooks, strict=True)
            return await asyncio.gather(*[model.generate(text, max_new_tokens=4, hooks=some) for text, some in asked])

    for n, found in enumerate(asyncio.run(continued())):
        hooks = [lk.Scale(f"blocks.{n % 4}.attn.hook_z", 0.5, heads=n % 8), lk.Save(STREAM)]
        expected = demo_gpt2.generate(texts[n], max_new_tokens=4, hooks=hooks)
        assert found.texts == expected.texts
        for one, other in zip(found.saved[STREAM], expected.saved[STREAM], strict=True):
            same(one, other)


def test_what_cannot_go_there_does_not(connection: Any) -> None:
    before = len(connection.jobs())
    model = connection.model("demo-gpt2")
    with pytest.raises(PlanFormatError, match=r"hooks\[1\]"):
        model.run_with_hooks(EIFFEL, [lk.Save(STREAM), ("blocks.0.hook_mlp_out", torch.relu)])
    assert len(connection.jobs()) == before
