import copy
import shutil

import lightning as L
import pytest
import torch

from repcodec.codec import RepCodec
from repcodec.data import Batch, ShardsDataModule
from repcodec.module import CodecModule


def module(shape=None, **options):
    torch.manual_seed(0)
    codec = RepCodec(8, codebook_size=16, **(shape or {})).double()
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 2)
    return CodecModule(
        codec, lambda p: torch.optim.Adam(p, 1e-3), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0), **options
    )


class Alone:
    """What the module asks of a trainer outside of one."""

    world_size = 1


def losses(model, features, lengths, full=False):
    model._trainer = Alone()
    batch = Batch(features, torch.tensor(lengths), torch.arange(len(lengths)), full)
    return model._losses(batch)[0]


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_masked_batch_has_the_losses_of_single_utterances(kind):
    model = module(reconstruction=kind, reconstruction_weight=45, commitment_weight=2)
    features, lengths = torch.randn(3, 12, 8).double(), [12, 5, 9]
    together = losses(model, features, lengths)
    alone = [losses(model, features[b : b + 1, :n], [n]) for b, n in enumerate(lengths)]
    for name in ("reconstruction", "commitment", "loss"):
        expected = sum(n * single[name] for n, single in zip(lengths, alone, strict=True)) / sum(lengths)
        torch.testing.assert_close(together[name], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(together["loss"], 45 * together["reconstruction"] + 2 * together["commitment"])


def test_masked_batch_has_the_gradients_of_cropped_utterances():
    model = module()
    features = torch.randn(1, 12, 8).double()
    losses(model, features, [7])["loss"].backward()
    masked = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    losses(model, features[:, :7], [7])["loss"].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(masked[name], parameter.grad, rtol=1e-9, atol=1e-9)


HALVING = {"enc_strides": (2, 1), "dec_strides": (1, 2)}


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("shape", [{}, HALVING, HALVING | {"pad_to_stride": False}], ids=["whole", "filled up", "cut"])
def test_batch_without_padding_is_computed_alike_without_masks(kind, shape):
    found = []
    for full in (False, True):
        model, features = module(shape, reconstruction=kind), torch.randn(3, 9, 8, generator=torch.manual_seed(1))
        features = features.double()
        model.codec.feature_mean.fill_(3.0)
        step = losses(model, features, [9, 9, 9], full)
        step["loss"].backward()
        model.codec.quantizer.update()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append({**step, **gradients, **model.codec.state_dict()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=1e-12)


def test_loss_is_measured_in_scaled_features():
    model = module()
    features = torch.randn(2, 6, 8).double()
    plain = losses(model, features, [6, 6])
    model.codec.feature_scale.fill_(10.0)
    model.codec.feature_mean.fill_(3.0)
    scaled = losses(model, features * 10 + 3, [6, 6])
    torch.testing.assert_close(scaled["reconstruction"], plain["reconstruction"])


def test_batch_without_a_valid_frame_gives_zero_and_moves_nothing():
    model = module()
    before = copy.deepcopy(model.codec.quantizer.state_dict())
    loss = losses(model, torch.zeros(2, 5, 8).double(), [0, 0])["loss"]
    loss.backward()
    model.codec.quantizer.update()
    assert loss == 0
    assert all(torch.equal(value, before[name]) for name, value in model.codec.quantizer.state_dict().items())


def test_unknown_reconstruction_is_refused():
    with pytest.raises(ValueError, match="expected l1 or l2"):
        module(reconstruction="huber")


def compiler():
    """Say why torch.compile cannot run here; None if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return f"torch.compile needs a C++ compiler: {error}"
    return None


@pytest.mark.slow
def test_compiled_stacks_give_the_same_losses_and_the_same_names(splits, tmp_path):
    if (reason := compiler()) is not None:
        pytest.skip(reason)
    found, states = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        codec = RepCodec(8, codebook_size=16)
        model = CodecModule(
            codec, lambda p: torch.optim.Adam(p, 1e-3), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
            compile=compiled,
        )  # fmt: skip
        assert (codec.encoder._compiled_call_impl is not None) == compiled
        logged = []

        class Log(L.Callback):
            def on_train_batch_end(self, trainer, module, *args, logged=logged):
                logged.append([float(trainer.callback_metrics[f"train/{n}"]) for n in ("reconstruction", "commitment")])

        data = ShardsDataModule(dim=8, encoder="hubert_base", layer=9, dir=str(splits), batch_size=4, crop=16)
        trainer = L.Trainer(accelerator="cpu", max_steps=20, max_epochs=-1, logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, num_sanity_val_steps=0, log_every_n_steps=1,
                            callbacks=[Log()])  # fmt: skip
        trainer.fit(model, data)
        trainer.save_checkpoint(tmp_path / "compiled.ckpt")
        codec.save_pretrained(tmp_path / "codec")
        found.append(torch.tensor(logged))
        states.append(model.state_dict())
    assert len(found[0]) == 20
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert states[0].keys() == states[1].keys()
    checkpoint = torch.load(tmp_path / "compiled.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == states[0].keys()
    assert RepCodec.from_pretrained(tmp_path / "codec").state_dict().keys() == codec.state_dict().keys()


def test_training_makes_the_error_fall(splits):
    shutil.rmtree(splits / "valid")
    shutil.copytree(splits / "train", splits / "valid")
    torch.manual_seed(0)
    model = CodecModule(
        RepCodec(8, codebook_size=16), lambda p: torch.optim.Adam(p, 1e-2),
        lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0), commitment_weight=45,
    )  # fmt: skip
    data = ShardsDataModule(dim=8, encoder="hubert_base", layer=9, dir=str(splits), batch_size=8, crop=32)
    trainer = L.Trainer(accelerator="cpu", max_steps=100, max_epochs=-1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, num_sanity_val_steps=0)  # fmt: skip
    before = float(trainer.validate(model, data, verbose=False)[0]["valid/normalized_error"])
    trainer.fit(model, data)
    after = float(trainer.validate(model, data, verbose=False)[0]["valid/normalized_error"])
    assert after < 0.6 * before
