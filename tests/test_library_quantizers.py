"""Every quantizer keeps the contract: masks, ranks, codes in range, gradients, saving, streaming, and both rates."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import DIM
from vector_quantize_pytorch import LFQ, SimVQ

from repcodec.codec import RepCodec
from repcodec.library_quantizers import QUANTIZERS, FSQQuantizer, LFQQuantizer, RotationQuantizer, SimVQQuantizer
from repcodec.quantizers import NO_CODE, EMAQuantizer, fit_centroids
from repcodec.stacks import frame_mask

ROOT = Path(__file__).parent.parent
MAKERS = {
    "ema": lambda dim: EMAQuantizer(dim, 16, 1, 0.9, 0.05),
    "rotation": lambda dim: RotationQuantizer(dim, 16, 1, 0.9, 0.05),
    "rotation, two codebooks": lambda dim: RotationQuantizer(dim, 16, 2, 0.9, 0.05),
    "simvq": lambda dim: SimVQQuantizer(dim, 16),
    "fsq": lambda dim: FSQQuantizer(dim, [5, 3]),
    "lfq": lambda dim: LFQQuantizer(dim, 16),
}
every_kind = pytest.mark.parametrize("kind", MAKERS)


def quantizer(kind, dim=6):
    torch.manual_seed(0)
    return MAKERS[kind](dim).double()


def batch(seed=0, dim=6):
    z = torch.randn(3, 10, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return z, frame_mask(torch.tensor([10, 4, 7]), 10)


def configuration(*overrides):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [*overrides])


def features_in(folder, labels=None):
    from repcodec.data import ShardsDataModule  # here: the two processes need no Lightning

    return ShardsDataModule(dim=DIM, encoder="whisper_tiny_en", layer=3, dir=str(folder), labels=labels)


def codec_of(kind, strides=(1, 1)):
    """A codec in float64 whose codes are where its vectors lie."""
    torch.manual_seed(0)
    codec = RepCodec(DIM, enc_strides=strides, dec_strides=strides[::-1], quantizer=MAKERS[kind](DIM)).double().eval()
    codec.quantizer.start(codec.vectors(torch.randn(1, 800, DIM).double().cumsum(1) / 3), seed=0)
    return codec


def test_every_kind_is_tested_and_can_be_chosen():
    assert {quantizer(kind).kind for kind in MAKERS} == set(QUANTIZERS)
    chosen = {path.stem for path in (ROOT / "conf" / "quantizer").glob("*.yaml")}
    assert set(QUANTIZERS) <= chosen


@every_kind
def test_decoded_codes_are_the_quantized_vectors(kind):
    for model in (quantizer(kind), quantizer(kind).eval()):
        z, mask = batch()
        output = model(z, mask)
        assert output.codes.shape == (3, model.num_codebooks, 10)
        assert output.codes.dtype == torch.int64
        valid = output.codes.mT[mask]
        assert valid.min() >= 0 and valid.max() < model.codebook_size
        assert len(valid.unique()) > 3
        assert (output.codes.mT[~mask] == NO_CODE).all()
        assert torch.equal(model.encode(z, mask), output.codes)
        torch.testing.assert_close(model.decode(output.codes), output.quantized, rtol=1e-12, atol=1e-12)
        assert (output.quantized[~mask] == 0).all()


@every_kind
def test_padding_and_batch_size_change_nothing(kind):
    padded, flat = quantizer(kind), quantizer(kind)
    z, mask = batch()
    for step in range(2):
        z, mask = batch(step)
        z.requires_grad_()
        rows = z.detach()[mask][None].requires_grad_()
        outputs = [padded(z + 100 * ~mask[..., None], mask), flat(rows, torch.ones(rows.shape[:2]).bool())]
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-10, atol=1e-12)
        assert torch.equal(outputs[0].codes.mT[mask], outputs[1].codes.mT[0])
        torch.testing.assert_close(outputs[0].quantized[mask], outputs[1].quantized[0], rtol=1e-10, atol=1e-12)
        for model, output in zip((padded, flat), outputs, strict=True):
            (output.quantized.square().sum() + output.loss).backward()
            model.update()
        torch.testing.assert_close(z.grad[mask], rows.grad[0], rtol=1e-8, atol=1e-10)
        assert (z.grad[~mask] == 0).all()
    for one, other in zip(padded.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)
    for name, value in padded.state_dict().items():
        torch.testing.assert_close(flat.state_dict()[name], value, rtol=1e-8, atol=1e-8)
    alone = [padded.encode(z[b : b + 1, : int(mask[b].sum())], mask[b : b + 1, : int(mask[b].sum())]) for b in range(3)]
    together = padded.encode(z, mask)
    assert all(torch.equal(row[0], together[b, :, : row.shape[-1]]) for b, row in enumerate(alone))


@every_kind
def test_gradients_reach_the_encoder_and_every_parameter(kind):
    model = quantizer(kind)
    z, mask = batch()
    z.requires_grad_()
    output = model(z, mask)
    output.quantized.sum().backward(retain_graph=True)
    assert (z.grad[mask].abs().sum(-1) > 0).all()
    output.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@every_kind
def test_without_a_valid_frame_the_loss_is_0_and_every_parameter_has_its_gradient(kind):
    model = quantizer(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    z, mask = batch()
    output = model(z.requires_grad_(), torch.zeros_like(mask))
    (output.loss + output.quantized.sum()).backward()
    model.update()
    assert output.loss == 0
    assert (output.codes == NO_CODE).all()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())  # None would stop DDP
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_kind
def test_a_frame_that_is_not_finite_is_told_by_loss_or_vectors_and_breaks_nothing(kind):
    model = quantizer(kind)
    z, mask = batch()
    z[0, 3, 1] = float("nan")
    output = model(z, mask)
    assert not torch.isfinite(output.loss + output.quantized.sum())
    assert output.codes.max() < model.codebook_size


@every_kind
def test_mixed_precision_gives_the_codes_and_loss_of_float32(kind):
    model = quantizer(kind).float()
    z, mask = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(z.bfloat16(), mask)
    expected = model(z.bfloat16().float(), mask)
    assert output.quantized.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.codes, expected.codes)


@pytest.mark.parametrize("kind", ["ema", "rotation", "simvq", "lfq"])
def test_the_vector_of_a_code_is_coded_by_it(kind):
    model = quantizer(kind, dim=4)  # the dimensions of lfq's 16 codes: without projections, whose back is no inverse
    codes = torch.arange(16)[None, None]
    assert torch.equal(model.encode(model.decode(codes), torch.ones(1, 16).bool()), codes)


def test_fsq_rounds_each_dimension_to_its_levels():
    model = quantizer("fsq", dim=2)
    vectors = model.decode(torch.arange(15)[None, None])[0]
    assert model.codebook_size == 15
    assert [sorted(set(vectors[:, i].tolist())) for i in range(2)] == [[-1, -0.5, 0, 0.5, 1], [-1, 0, 1]]
    assert len(vectors.unique(dim=0)) == 15
    steps = torch.linspace(-4, 4, 101).double()
    grid = torch.cartesian_prod(steps, steps)[None]
    output = model(grid, torch.ones(1, len(grid[0])).bool())
    assert len(output.codes.unique()) == 15
    assert torch.equal(output.quantized.sign() * grid.sign() >= 0, torch.ones_like(grid).bool())


def test_rotation_turns_and_scales_the_gradient():
    model = quantizer("rotation")
    z, mask = batch()
    z.requires_grad_()
    output = model(z, mask)
    weight = torch.randn_like(z)
    (output.quantized * weight).sum().backward()
    for e, q, w, found in zip(z[mask], output.quantized[mask], weight[mask], z.grad[mask], strict=True):
        e, q = e.detach(), q.detach()
        u, v = e / e.norm(), q / q.norm()
        r = (u + v) / (u + v).norm()
        turn = torch.eye(6).double() - 2 * torch.outer(r, r) + 2 * torch.outer(v, u)
        torch.testing.assert_close(turn @ e * q.norm() / e.norm(), q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, q.norm() / e.norm() * turn.T @ w, rtol=1e-6, atol=1e-6)


def test_simvq_is_the_packages_own_of_the_valid_frames():
    model, theirs = quantizer("simvq"), SimVQ(dim=6, codebook_size=16).double()
    theirs.load_state_dict(model.vq.state_dict())
    z, mask = batch()
    z.requires_grad_()
    rows = z.detach()[mask][None].requires_grad_()
    output = model(z, mask)
    quantized, codes, loss = theirs(rows)
    assert torch.equal(output.codes[:, 0][mask], codes[0])
    torch.testing.assert_close(output.quantized[mask], quantized[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.loss, loss)
    (output.loss + output.quantized.square().sum()).backward()
    (loss + quantized.square().sum()).backward()
    torch.testing.assert_close(z.grad[mask], rows.grad[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.vq.code_transform.weight.grad, theirs.code_transform.weight.grad)


def test_lfq_is_the_packages_own_of_the_valid_frames_on_one_rank():
    model = quantizer("lfq")
    theirs = LFQ(dim=6, codebook_size=16, commitment_loss_weight=0.25, force_quantization_f32=False).double()
    theirs.load_state_dict(model.vq.state_dict(), strict=False)
    z, mask = batch()
    z = (z / 20).requires_grad_()  # near 0, where the entropies are neither 0 nor all
    rows = z.detach()[mask][None].requires_grad_()
    output = model(z, mask)
    quantized, codes, loss = theirs(rows)
    assert torch.equal(output.codes[:, 0][mask], codes[0])
    torch.testing.assert_close(output.quantized[mask], quantized[0])
    torch.testing.assert_close(output.loss, loss, rtol=1e-3, atol=1e-3)  # they cut logarithms off at 1e-5
    output.loss.backward()
    loss.backward()
    torch.testing.assert_close(z.grad[mask], rows.grad[0], rtol=0.02, atol=2e-3)


@every_kind
def test_a_start_lowers_the_error_and_uses_most_codes(kind):
    model, again = quantizer(kind), quantizer(kind)
    # Features vary most in a few directions.
    z = torch.randn(600, 6, dtype=torch.float64) * torch.tensor([4, 3, 1, 0.5, 0.2, 0.1]).double() + 5
    mask = torch.ones(1, 600).bool()

    def error():
        return ((model.eval()(z[None], mask).quantized[0] - z).square().sum() / (z - z.mean(0)).square().sum()).item()

    before = error()
    model.start(z, seed=0)
    again.start(z, seed=0)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert error() < min(0.5, before)
    assert len(model.encode(z[None], mask)[0, 0].unique()) > 0.9 * model.codebook_size


def test_simvq_starts_where_kmeans_ends():
    model = quantizer("simvq")
    z = torch.randn(200, 6, dtype=torch.float64)
    model.start(z, seed=3)
    expected = torch.from_numpy(fit_centroids(z.numpy(), 16, 3)).double()
    torch.testing.assert_close(model.decode(torch.arange(16)[None, None])[0], expected)


@pytest.mark.parametrize("model", [FSQQuantizer(3, [3, 3, 3]), LFQQuantizer(3, 8), FSQQuantizer(3, [3] * 5)])
def test_a_start_takes_any_number_of_dimensions_and_frames(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.start(torch.ones(1, 3), seed=0)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    if not model.vq.has_projections:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _steps(kind, rank=None):
    """Three steps of gradient descent, and a start; of all frames, or of one of two ranks' share."""
    model = quantizer(kind)
    for step in range(3):
        z, mask = batch(step)
        if step == 1:
            mask[1:] = False  # rank 1 has no valid frame at all
        total = int(mask.sum())
        if rank is not None:
            mine = slice(0, 1) if rank == 0 else slice(1, 3)
            z, mask = z[mine], mask[mine]
        output = model(z.requires_grad_(), mask)
        # As `CodecModule` weighs a rank's mean; DDP averages over ranks what is summed here.
        (output.loss * mask.sum() / total + output.quantized.square().sum() / total).backward()
        model.update()
        with torch.no_grad():
            for parameter in model.parameters():
                if rank is not None:
                    dist.all_reduce(parameter.grad)
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    after = {name: value.clone() for name, value in model.state_dict().items()}
    z = batch(9)[0].flatten(0, 1)
    model.start(z if rank in (None, 0) else z[:0], seed=0)
    return {**after, **{f"started {name}": value for name, value in model.state_dict().items()}}


def _rank(rank, folder):
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(minutes=1))
    torch.save({kind: _steps(kind, rank) for kind in MAKERS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_every_quantizer(tmp_path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for kind in MAKERS:
        expected = _steps(kind)
        for found in ranks:
            for name, value in expected.items():
                torch.testing.assert_close(found[kind][name], value, rtol=1e-8, atol=1e-8, msg=f"{kind}: {name}")
