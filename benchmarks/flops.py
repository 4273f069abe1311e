"""How long the shared-prefix work must take: its floating-point operations at the rate that this machine multiplies matrices at."""

import time

import torch
from transformers import PreTrainedModel

FORMULA = (
    "2·w per token and layer for w weights, 4·a per query token, key token and layer for attention of a = heads × head size. The context "
    "once, causal, with the last layer's keys and values only; each query's tokens against the context and its own tokens before them; the "
    "last layer's queries, output and MLP and the head at the answer position alone. Divided by the rate of the MLP's product in this run."
)


def shared_prefix_flops(model: PreTrainedModel, context: int, queries: list[int]) -> float:
    """Operations to answer queries of these lengths (tokens) behind one context of `context` tokens."""
    config = model.config.get_text_config()
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = config.num_attention_heads * head
    keys_values = 2 * hidden * config.num_key_value_heads * head
    weights = 2 * hidden * attention + keys_values + 3 * hidden * inner
    total = context * (2 * weights * (layers - 1) + 2 * keys_values) + 2 * attention * context**2 * (layers - 1)
    for tokens in queries:
        total += tokens * (2 * weights * (layers - 1) + 2 * keys_values)
        total += 4 * attention * tokens * (context + (tokens + 1) / 2) * (layers - 1)
        total += 2 * (weights - keys_values) + 4 * attention * (context + tokens) + 2 * hidden * config.vocab_size
    return total


def product_rate(model: PreTrainedModel, rows: int = 1536, seconds: float = 1.0) -> float:
    """Operations a second of the model's MLP product on `rows` tokens: the best of many."""
    config = model.config.get_text_config()
    x = torch.randn(rows, config.hidden_size, dtype=model.dtype, device=model.device)
    weight = torch.randn(config.intermediate_size, config.hidden_size, dtype=model.dtype, device=model.device)
    times: list[float] = []
    while sum(times) < seconds:
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * rows * config.hidden_size * config.intermediate_size / min(times)
