"""`generate` and `pipeline`: the cache, padding and router logits change nothing in what is generated."""

import pytest
import torch
from tiny import tiny, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from hf_moe import MoEForCausalLM

LENGTH = 8
STRATEGIES = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sample": {"do_sample": True, "top_k": 20},
    "beam_sample": {"do_sample": True, "num_beams": 2},
}
FAMILIES = ["llama", "gpt2", "mistral", "gemma3", "opt"]


def generate(model: MoEForCausalLM, ids: Tensor, strategy: str, **arguments: object) -> Tensor:
    torch.manual_seed(0)
    settings = {"attention_mask": torch.ones_like(ids), **STRATEGIES[strategy], **arguments}
    found = model.generate(ids, max_new_tokens=LENGTH, eos_token_id=None, pad_token_id=0, **settings)
    assert found.shape[1] == ids.shape[1] + LENGTH
    return found[:, ids.shape[1] :]


@pytest.mark.parametrize("router_logits", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cache(family: str, strategy: str, router_logits: bool) -> None:
    """The growing cache and the static one generate what a model without cache does."""
    model, ids = tiny(family), token_ids()
    expected = generate(model, ids, strategy, use_cache=False)
    assert len(expected.unique()) > 2
    arguments = {"output_router_logits": router_logits}
    assert torch.equal(generate(model, ids, strategy, **arguments), expected)
    assert torch.equal(generate(model, ids, strategy, cache_implementation="static", **arguments), expected)


@pytest.mark.parametrize("router", ["top_k", "sigmoid", "hash", "strictly_balanced", "noisy_top_k"])
def test_cache_of_routers(router: str) -> None:
    model, ids = tiny(router_type=router), token_ids()
    assert torch.equal(generate(model, ids, "greedy"), generate(model, ids, "greedy", use_cache=False))


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding(family: str, strategy: str, arguments: dict) -> None:
    """A left-padded batch generates what each sequence generates alone, with router logits as well."""
    model = tiny(family)
    long, short = token_ids(1, 10, seed=1), token_ids(1, 6, seed=2)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)])
    expected = torch.cat([generate(model, long, strategy), generate(model, short, strategy)])
    for router_logits in (False, True):
        found = generate(
            model, ids, strategy, attention_mask=(ids != 0).long(), output_router_logits=router_logits, **arguments
        )
        assert torch.equal(found, expected)


def test_router_logits_of_a_cached_forward() -> None:
    """One `[B·S, E]` tensor per MoE layer, S the new tokens, the same as without a cache."""
    model, ids = tiny(decoder_sparse_step=2, num_experts=5), token_ids(2, 10)
    full = model(input_ids=ids, output_router_logits=True).router_logits
    past = model(input_ids=ids[:, :7], use_cache=True)
    assert past.router_logits is None
    cached = model(input_ids=ids[:, 7:], past_key_values=past.past_key_values, output_router_logits=True).router_logits
    assert [logits.shape for logits in cached] == [(2 * 3, 5)]
    # another order of summation in attention over a cache
    torch.testing.assert_close(cached[0].view(2, 3, 5), full[0].view(2, 10, 5)[:, 7:], rtol=1e-5, atol=1e-5)


def test_generated_outputs() -> None:
    """`return_dict_in_generate` with scores, and the generation config's own values."""
    model, ids = tiny(), token_ids()
    model.generation_config.max_new_tokens = 3
    outputs = model.generate(ids, return_dict_in_generate=True, output_scores=True, output_logits=True, do_sample=False)
    assert outputs.sequences.shape == (2, 13)
    # of the last token alone, as `generate` asks for: how MKL rounds depends on the number of rows on an AMD
    assert torch.equal(outputs.logits[0], model(input_ids=ids, logits_to_keep=1).logits[:, -1])


def test_assisted() -> None:
    """A draft model changes the speed, not the text."""
    model, ids = tiny(), token_ids(1)
    draft = AutoModelForCausalLM.from_config(model.config.get_text_config()).eval()
    assert torch.equal(generate(model, ids, "greedy", assistant_model=draft), generate(model, ids, "greedy"))
    lookup = generate(model, ids, "greedy", prompt_lookup_num_tokens=2)
    assert torch.equal(lookup, generate(model, ids, "greedy"))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 128))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def test_pipeline(tmp_path) -> None:
    model, tokenizer = tiny(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", str(tmp_path), device="cpu")
    assert type(generator.model) is MoEForCausalLM
    prompts = ["w10 w20 w30 w40", "w50 w60"]
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    texts = [row[0]["generated_text"].split() for row in generator(prompts, batch_size=2, **arguments)]
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(expected, skip_special_tokens=True).split()
        assert text
