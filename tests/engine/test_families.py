"""Every architecture of the table: packed, it says what transformers' own model says of each sequence."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config

from engine.attention import one_sequence
from engine.base_model import BaseModel
from engine.cache import KeyValueCache
from engine.engine import Engine
from engine.errors import UnsupportedBase
from engine.families import FAMILIES
from engine.run import Microbatch, Row
from engine.sampling import Sample, advance
from engine.segments import Segment, pack
from tests.engine.loads import lora, mixlora
from tests.models import VOCABULARY, tiny_base, tiny_config, tiny_model

LENGTHS = [21, 1, 9, 40, 13]
"""Most are longer than the sliding window of those that have one (8)."""


def rows() -> list[Row]:
    draw = np.random.default_rng(0)
    return [Row(draw.integers(0, VOCABULARY, n), np.arange(1, n), np.ones(n - 1)) for n in LENGTHS]


def plain_logprobs(model_type: str, row: Row, dtype: torch.dtype) -> torch.Tensor:
    """Of the unmodified model, with the attention that its authors wrote."""
    model = tiny_model(model_type, dtype)
    model.set_attn_implementation("eager")
    tokens = torch.from_numpy(row.tokens)
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits[0, :-1]
    return F.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_packed_pass_gives_the_logprobs_of_the_unmodified_model(model_type: str, dtype: torch.dtype) -> None:
    """Also beside fresh adapters, which change nothing. In float64 it is a softmax in float32 that differs."""
    engine = Engine(tiny_base(model_type, dtype))
    runs = [None, engine.create_run(lora(), seed=0), engine.create_run(mixlora(), seed=1)]
    together = engine.forward([Microbatch(rows=rows(), run=run) for run in runs])
    for row, *ours in zip(rows(), *(outcome.logprobs for outcome in together), strict=True):
        theirs = plain_logprobs(model_type, row, dtype)
        for logprobs in ours:
            torch.testing.assert_close(logprobs, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_a_packed_pass_is_exact_in_float64(model_type: str) -> None:
    """Against transformers' sdpa attention, which stays in float64 (and knows no soft-cap, so not for gemma2)."""
    engine = Engine(tiny_base(model_type, torch.float64))
    model = tiny_model(model_type, torch.float64)
    model.set_attn_implementation("sdpa")
    (outcome,) = engine.forward([Microbatch(rows=rows())])
    for row, ours in zip(rows(), outcome.logprobs, strict=True):
        tokens = torch.from_numpy(row.tokens)
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1]
        theirs = F.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model_type", ["mistral", "gemma2"])
def test_the_sliding_window_is_what_the_test_models_look_through(model_type: str) -> None:
    """The control: without it the log-probs are others, from the first token that it hides on."""
    window = tiny_config(model_type).sliding_window
    model = tiny_model(model_type)
    model.config.sliding_window = 1000  # where Mistral reads it
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None  # where Gemma does
    bases = [tiny_base(model_type), BaseModel(model, name="open", hash_="open")]
    (row,) = [row for row in rows() if len(row.tokens) == 40]
    seen, whole = (Engine(base).forward([Microbatch(rows=[row])])[0].logprobs[0] for base in bases)
    torch.testing.assert_close(seen[:window], whole[:window])
    assert (seen[window:] - whole[window:]).abs().min() > 1e-4


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sampling_with_a_cache_is_greedy_recomputation(model_type: str) -> None:
    prompts = [[5, 17, 300, 4, 250, 81, 6, 99, 3, 41, 77, 12], [7]]
    base = tiny_base(model_type)
    samples = [Sample(prompt, max_tokens=12) for prompt in prompts]
    advance(base, samples, 12)
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    for sample, tokens in zip(samples, prompts, strict=True):
        for token, logprob in zip(sample.tokens, sample.logprobs, strict=True):
            with torch.no_grad():
                logprobs = F.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0, -1], -1)
            assert token == int(logprobs.argmax())
            assert logprob == pytest.approx(float(logprobs[token]), abs=2e-5)
            tokens = [*tokens, token]


def test_an_architecture_that_is_not_in_the_table_is_refused() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    with pytest.raises(UnsupportedBase, match=r"The architecture 'gpt2' is not supported; take one of llama, .*gemma2"):
        BaseModel(AutoModelForCausalLM.from_config(config), name="gpt2", hash_="")


@pytest.mark.parametrize("argument", ["cu_seq_lens_q", "head_mask", "position_bias", "attention_mask"])
def test_an_attention_argument_that_is_not_understood_is_an_error(engine: Engine, argument: str) -> None:
    model = engine.base.model.model
    batch = pack([Segment([torch.arange(16)])], torch.device("cpu"))
    hidden = torch.zeros(1, 16, 32)
    given = {"position_embeddings": model.rotary_emb(hidden, batch.positions[None]), "attention_mask": None}
    with engine.base.pass_.over(batch):
        model.layers[0].self_attn(hidden, **given | {argument: None})
        with pytest.raises(UnsupportedBase, match="asks for what the engine does not do"):
            model.layers[0].self_attn(hidden, **given | {argument: torch.ones(1)})


def test_attention_dropout_is_an_error() -> None:
    """A model asks for it only in training."""
    base = tiny_base()
    for layer in base.model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    base.model.train()
    with pytest.raises(UnsupportedBase, match="asks for what the engine does not do"):
        Engine(base).forward([Microbatch(rows=rows())])


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, softcap: float | None
) -> torch.Tensor:
    """One head and one query at a time: [H, L, C] over [G, M, C] -> [H, L, C]."""
    outputs = torch.zeros_like(q)
    past = k.shape[1] - q.shape[1]
    for head in range(len(q)):
        group = head * len(k) // len(q)
        for place in range(q.shape[1]):
            stop = past + place + 1
            start = max(0, stop - window)
            scores = k[group, start:stop] @ q[head, place] / math.sqrt(q.shape[2])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            outputs[head, place] = scores.softmax(0) @ v[group, start:stop]
    return outputs


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["no cap", "cap"])
@pytest.mark.parametrize("window", [None, 3, 100], ids=["no window", "window 3", "wide window"])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 7), (3, 7), (1, 1)])
def test_attention_of_one_sequence_is_the_plain_formula(
    queries: int, keys: int, window: int | None, softcap: float | None
) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 8, generator=draw) for heads, n in ((4, queries), (2, keys), (2, keys)))
    got = one_sequence(q, k, v, None, window, softcap)[0]
    torch.testing.assert_close(got, plain_attention(q[0], k[0], v[0], window or keys, softcap))


def test_a_key_value_cache_holds_what_was_appended() -> None:
    cache = KeyValueCache(num_layers=2, capacity=5)
    parts = [torch.randn(1, 2, n, 4) for n in (3, 1, 1)]
    for part in parts:
        keys, values = cache.extend(1, part, -part)
        cache.length += part.shape[2]
    assert torch.equal(keys, torch.cat(parts, dim=2))
    assert torch.equal(values, -keys)
