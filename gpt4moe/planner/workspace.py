"""What comes and goes within one layer's forward and backward pass, beside what autograd keeps. Bytes.

The largest of a rank's layers counts, once: layers come one after another. These are read off the code, not measured
byte by byte: torch's allocator decides how long a temporary stays.
"""

from collections.abc import Callable

from gpt4moe.config.model import AttentionKind, MlpKind
from gpt4moe.planner.activations import FLOAT, MicroBatch


def expert_workspace(micro: MicroBatch) -> int:
    """The larger of two moments: rows under way (sent, received, sorted), or the backward pass through the experts
    with the fp32 copies of its activation; and the weight gradients before they are added to the main gradients."""
    model, moe, rows, item = micro.model, micro.model.moe, micro.expert_rows, micro.item
    assert moe is not None
    hidden, ffn = model.hidden_size, moe.ffn_hidden_size // micro.layout.etp
    sent = micro.layout.etp * micro.split_tokens * moe.top_k
    moving = (sent + 2 * rows) * hidden * item
    # Grouped products take all experts at once, the loop one after another.
    at_once = rows if micro.grouped else -(-rows // micro.local_experts)
    activation = at_once * ffn * (6 * FLOAT + 3 * item) + 2 * rows * hidden * item
    weights = micro.local_experts * hidden * ffn * item * (2 if micro.grouped else 3)
    return max(moving, activation + weights)


def dense_workspace(micro: MicroBatch) -> int:
    """The gathered input, its gradient, the gradients of the inner activations and of one weight."""
    hidden, ffn = micro.model.hidden_size, (micro.model.ffn_hidden_size or 0) // micro.layout.tp
    return (2 * micro.tokens * hidden + micro.tokens * 4 * ffn + 2 * ffn * hidden) * micro.item


def attention_workspace(micro: MicroBatch) -> int:
    """The gathered input and its gradient; gradients of queries, keys, values and output; of the qkv weight."""
    model, tp = micro.model, micro.layout.tp
    width = (2 * model.num_attention_heads + 2 * model.query_groups) * model.head_size // tp
    return (2 * micro.tokens * model.hidden_size + 2 * micro.tokens * width + width * model.hidden_size) * micro.item


ATTENTION_WORKSPACE: dict[AttentionKind, Callable[[MicroBatch], int]] = {
    AttentionKind.grouped_query: attention_workspace,
    AttentionKind.latent: attention_workspace,
}
MLP_WORKSPACE: dict[MlpKind, Callable[[MicroBatch], int]] = {
    MlpKind.dense: dense_workspace,
    MlpKind.moe: expert_workspace,
}


def layer_workspace(micro: MicroBatch, layer: int) -> int:
    """The largest of a layer's parts."""
    kind = micro.kinds[layer]
    return max(ATTENTION_WORKSPACE[kind.attention](micro), MLP_WORKSPACE[kind.mlp](micro))


def head_workspace(micro: MicroBatch) -> int:
    """Logits and their gradient in the model's dtype beside the fp32 probabilities, the gathered input and its
    gradient, the weight's gradient."""
    vocabulary, hidden = micro.model.vocab_size // micro.layout.tp, micro.model.hidden_size
    logits = micro.tokens * vocabulary * micro.item if micro.item != FLOAT else 0
    return logits + (2 * micro.tokens + vocabulary) * hidden * micro.item
