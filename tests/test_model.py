"""The whole model against PyTorch: loss, every gradient, ten optimizer steps."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from models import mean_loss, new_model, noisy_weights, training_step

from gpu_gpt2.config import GPT2Config
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.arena import flat_views
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.families import parameters
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.models.model import SHAPES_KEPT, Model
from gpu_gpt2.training.optimizer import AdamW

CONFIG = GPT2Config(vocab_size=1027, n_positions=40, n_embd=96, n_layer=3, n_head=4)
B, T = 3, 33
TRANSPOSED = {"qkvw", "attprojw", "fcw", "fcprojw"}  # Hugging Face's Conv1D holds (in, out)
LAYER_NAMES = {
    "ln1w": "ln_1.weight", "ln1b": "ln_1.bias",
    "qkvw": "attn.c_attn.weight", "qkvb": "attn.c_attn.bias",
    "attprojw": "attn.c_proj.weight", "attprojb": "attn.c_proj.bias",
    "ln2w": "ln_2.weight", "ln2b": "ln_2.bias",
    "fcw": "mlp.c_fc.weight", "fcb": "mlp.c_fc.bias",
    "fcprojw": "mlp.c_proj.weight", "fcprojb": "mlp.c_proj.bias",
}  # fmt: skip
TOP_NAMES = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}


def weights() -> np.ndarray:
    return noisy_weights(CONFIG, noise_seed=1)


def batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, CONFIG.vocab_size, (2, B, T)).astype(np.int32)
    tokens[:, ::3] = tokens[0, 0]  # some tokens often, so that their gradients add up
    return Batch.of(tokens, targets)


def our_model(arena: np.ndarray) -> Model:
    model = new_model(CONFIG, B=B, T=T)
    model.load(arena)
    return model


def torch_model(arena: np.ndarray, dtype: torch.dtype) -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        vocab_size=CONFIG.vocab_size, n_positions=CONFIG.n_positions, n_embd=CONFIG.n_embd,
        n_layer=CONFIG.n_layer, n_head=CONFIG.n_head, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(dtype)
    ours = flat_views(parameters(CONFIG), arena)
    with torch.no_grad():
        for _, theirs, array in paired(model, ours):
            theirs.copy_(torch.from_numpy(np.ascontiguousarray(array)))
    return model


def paired(model: transformers.GPT2LMHeadModel, ours: SimpleNamespace):
    """(our name, their parameter, our array in their shape) for every parameter tensor."""
    theirs = dict(model.transformer.named_parameters())
    for name, their_name in TOP_NAMES.items():
        array = getattr(ours, name)
        yield name, theirs[their_name], array[: CONFIG.vocab_size] if name == "wte" else array
    for name, their_name in LAYER_NAMES.items():
        for l in range(CONFIG.n_layer):
            array = getattr(ours, name)[l]
            yield (
                f"{name}[{l}]",
                theirs[f"h.{l}.{their_name}"],
                array.T if name in TRANSPOSED else array,
            )


def torch_loss(model: transformers.GPT2LMHeadModel, batch: Batch) -> torch.Tensor:
    logits = model(torch.from_numpy(batch.tokens).long()).logits
    flat = torch.from_numpy(batch.targets).long().reshape(-1)
    return torch.nn.functional.cross_entropy(logits.reshape(-1, CONFIG.vocab_size), flat)


def test_loss_and_every_gradient_match_pytorch() -> None:
    arena = weights()
    ours = our_model(arena)
    mean = mean_loss(ours, batch())
    single, double = torch_model(arena, torch.float32), torch_model(arena, torch.float64)
    losses = [torch_loss(m, batch()) for m in (single, double)]
    for loss in losses:
        loss.backward()
    assert abs(mean - losses[0].item()) < 1e-5
    assert abs(mean - losses[1].item()) < 1e-5
    # Bound: relative to the largest gradient of the tensor, as float32 sums lose in the smallest.
    exact = dict(double.transformer.named_parameters())
    names = {id(p): n for n, p in single.transformer.named_parameters()}
    for name, theirs, grad in paired(single, ours.grads):
        expected = exact[names[id(theirs)]].grad.numpy()
        worst = np.abs(grad - expected).max() / np.abs(expected).max()
        assert worst < 1e-5, f"{name}: {worst:.2e} of the largest gradient"
        beside = np.abs(grad - theirs.grad.numpy()).max() / np.abs(expected).max()
        assert beside < 2e-5, f"{name}: {beside:.2e} from PyTorch's float32"
    assert not ours.grads.wte[CONFIG.vocab_size :].any()


def test_ten_adamw_steps_match_pytorch() -> None:
    arena = weights()
    ours, theirs = our_model(arena), torch_model(arena, torch.float32)
    optimizer = AdamW(ours, weight_decay=0.1)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    torch_optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(1, 11):
        result = training_step(ours, optimizer, [batch(step % 3)], 1e-3)
        torch_optimizer.zero_grad()
        loss = torch_loss(theirs, batch(step % 3))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch_optimizer.step()
        assert abs(result.loss - loss.item()) < 1e-5, f"step {step}"
        assert abs(result.grad_norm - norm.item()) < 1e-4 * norm.item()
    for name, theirs_p, array in paired(theirs, ours.params):
        worst = np.abs(array - theirs_p.detach().numpy()).max()
        assert worst < 2e-5, f"{name}: {worst:.2e} after ten steps of 1e-3"


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    arena, all_rows = weights(), batch()
    whole, parts = our_model(arena), our_model(arena)
    expected = whole.forward_backward(all_rows).sum()
    for i in range(B):
        row = Batch.of(all_rows.tokens[i : i + 1], all_rows.targets[i : i + 1])
        losses = parts.forward_backward(row, first=i == 0, micro_steps=B)
    np.testing.assert_allclose(losses.sum(), expected, rtol=1e-6)
    worst = np.abs(parts.grad_arena - whole.grad_arena).max()
    assert worst < 1e-6 * np.abs(whole.grad_arena).max()


def test_a_second_step_overwrites_the_gradients_of_the_first() -> None:
    model = our_model(weights())
    grads = []
    for _ in range(2):
        model.forward_backward(batch())
        grads.append(model.grad_arena.copy())
    np.testing.assert_array_equal(grads[0], grads[1])


def test_losses_are_those_of_training() -> None:
    model = our_model(weights())
    np.testing.assert_array_equal(model.losses(batch()), model.forward_backward(batch()))


def test_batches_of_other_shapes_share_the_memory() -> None:
    arena, tokens = weights(), batch().tokens
    big = our_model(arena)
    small = new_model(CONFIG, B=1, T=9, training=False)
    small.load(arena)
    before = big.forward(tokens).copy()
    np.testing.assert_allclose(
        big.forward(tokens[:1, :9]).copy(), small.forward(tokens[:1, :9]), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_array_equal(big.forward(tokens), before)


def test_a_model_is_freed_without_the_garbage_collector() -> None:
    """On a GPU its memory would else be held until the collector happens to run."""
    gc.disable()
    try:
        model = our_model(weights())
        optimizer = AdamW(model)
        training_step(model, optimizer, [batch()], 1e-3)
        model.losses(batch())
        model.forward(batch().tokens)
        freed = weakref.ref(model), weakref.ref(optimizer)
        del model, optimizer
        assert [ref() for ref in freed] == [None, None]
    finally:
        gc.enable()


def test_many_shapes_give_what_each_gives_alone() -> None:
    model, tokens = our_model(weights()), batch().tokens
    first = model.forward(tokens[:1, :1]).copy()
    for n in range(2, SHAPES_KEPT + 5):
        model.forward(tokens[:1, :n])
    np.testing.assert_array_equal(model.forward(tokens[:1, :1]), first)


def test_overfits_one_batch() -> None:
    model = our_model(initial_weights(CONFIG, 0))
    optimizer = AdamW(model)
    losses = [training_step(model, optimizer, [batch()], 3e-3).loss for _ in range(60)]
    assert losses[0] > 6.5  # ln 1027 = 6.93
    assert losses[-1] < 0.1


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="longer than the model's context of 40"):
        new_model(CONFIG, B=1, T=41)
    with pytest.raises(ConfigError, match="longer than the model's context of 40"):
        our_model(weights()).forward(np.zeros((1, 41), np.int32))
