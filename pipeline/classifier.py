"""A GPT that labels: a linear head on the last real token.

Shapes: B rows, T tokens, C n_embd, K labels.
"""

import torch
from torch import Tensor, nn

from pipeline.gpt import GPT, INIT_STD


class GPTClassifier(nn.Module):
    """A GPT that labels: it takes over a GPT and drops its language-model head, if any.

    The last real token has seen the whole text, so the head reads its hidden state. The head has a
    bias if the model's other linear layers have one. Llama's have none, so other tools have no
    place for it; GPT-2's last norm can absorb it.
    """

    def __init__(self, gpt: GPT, n_labels: int) -> None:
        super().__init__()
        self.gpt = gpt
        if hasattr(gpt, "head"):
            del gpt.head
        self.classifier = nn.Linear(gpt.config.n_embd, n_labels, bias=gpt.config.bias)
        nn.init.normal_(self.classifier.weight, std=INIT_STD)
        if gpt.config.bias:
            nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, K) of ids (B, T), right-padded; the mask (B, T) bool is true at real ids."""
        hidden = self.gpt(input_ids, attention_mask)  # (B, T, C)
        if attention_mask is None:
            return self.classifier(hidden[:, -1])
        last = attention_mask.sum(dim=1) - 1  # (B,)
        return self.classifier(hidden[torch.arange(len(last), device=last.device), last])

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter by name."""
        return {name: p.detach() for name, p in self.named_parameters()}
