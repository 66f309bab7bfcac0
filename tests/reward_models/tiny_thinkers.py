"""Small causal models with the calls of transformers, made here."""

from types import SimpleNamespace

import tiny_models
import torch
from torch import nn


class TinyCausal(nn.Module):
    """Embedding, one layer of causal attention, logits; no cache and no generate."""

    def __init__(self, vocabulary=12, width=8, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.places = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(width, vocabulary)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None):
        length = input_ids.shape[1]
        hidden = self.embedding(input_ids) + self.places(torch.arange(length))
        causal = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        hidden = self.layer(hidden, src_mask=causal)
        return SimpleNamespace(logits=self.out(hidden), last_hidden_state=hidden)


def llama(vocabulary=32, seed=0, tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=vocabulary, pad_token_id=0, eos_token_id=1, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config).eval()


def tokenizer_with_query():
    made = tiny_models.tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<reward>"]})
    return made, made.convert_tokens_to_ids("<reward>")
