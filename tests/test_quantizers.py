import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from repcodec.quantizers import NO_CODE, EMACodebook, EMAQuantizer, fit_centroids, nearest_code
from repcodec.stacks import frame_mask


def quantizer(num_codebooks=1, size=12, dim=4, **options):
    torch.manual_seed(0)
    return EMAQuantizer(dim, size, num_codebooks, **options).double()


def batch(seed=0, dim=4):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(3, 10, dim, dtype=torch.float64, generator=generator)
    return z, frame_mask(torch.tensor([10, 4, 7]), 10)


def plain_ema(codes, counts, sums, frames, decay):
    """facts.md's formulas, a code at a time."""
    new_codes, new_counts, new_sums = codes.clone(), counts.clone(), sums.clone()
    chosen = [min(range(len(codes)), key=lambda v: float(((frame - codes[v]) ** 2).sum())) for frame in frames]
    for v in range(len(codes)):
        mine = [frame for frame, code in zip(frames, chosen, strict=True) if code == v]
        new_counts[v] = decay * counts[v] + (1 - decay) * len(mine)
        new_sums[v] = decay * sums[v] + (1 - decay) * sum(mine, torch.zeros_like(sums[v]))
    total = sum(new_counts)
    for v in range(len(codes)):
        n = (new_counts[v] + 1e-5) / (total + len(codes) * 1e-5) * total
        new_codes[v] = new_sums[v] / n
    return new_codes, new_counts, new_sums


def test_nearest_code_is_the_brute_force_minimum():
    z, codebook = torch.randn(50, 6).double(), torch.randn(20, 6).double()
    distances = (z[:, None] - codebook[None]).square().sum(-1)
    assert torch.equal(nearest_code(z, codebook), distances.argmin(1))


def test_nearest_code_does_not_depend_on_blocks():
    z, codebook = torch.randn(40_000, 3).double(), torch.randn(7, 3).double()
    assert torch.equal(nearest_code(z, codebook)[20_000:20_100], nearest_code(z[20_000:20_100], codebook))


def test_published_start():
    codebook = EMACodebook(1024, 64, 0.8, 0.0)
    assert torch.equal(codebook.codes, codebook.sums)
    assert (codebook.counts == 0).all()
    assert abs(codebook.codes.mean()) < 0.02
    assert abs(codebook.codes.std() - 1) < 0.02


def test_updates_follow_the_published_formulas():
    model = quantizer(decay=0.8)
    codebook = model.codebooks[0]
    for step in range(4):
        z, mask = batch(step)
        expected = plain_ema(codebook.codes, codebook.counts, codebook.sums, list(z[mask]), 0.8)
        before = codebook.codes.clone()
        output = model(z, mask)
        assert torch.equal(codebook.codes, before)
        torch.testing.assert_close(output.quantized[mask].detach(), before[output.codes[:, 0][mask]])
        model.update()
        for name, value in zip(("codes", "counts", "sums"), expected, strict=True):
            torch.testing.assert_close(getattr(codebook, name), value, rtol=1e-8, atol=1e-8)


def test_commitment_loss_and_straight_through_gradient():
    model = quantizer()
    z, mask = batch()
    z.requires_grad_()
    output = model(z, mask)
    vectors = model.codebooks[0].codes[output.codes[:, 0].clamp(min=0)]
    torch.testing.assert_close(output.loss, (z - vectors)[mask].square().mean())
    weight = torch.randn_like(z)
    (output.quantized * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight * mask[..., None])


def test_only_the_first_codebooks_loss_reaches_the_encoder():
    model, first = quantizer(3), quantizer(1)
    first.codebooks[0].load_state_dict(model.codebooks[0].state_dict())
    grads = []
    for m in (model, first):
        z, mask = batch()
        z.requires_grad_()
        m(z, mask).loss.backward()
        grads.append(z.grad)
    torch.testing.assert_close(*grads)


def test_residual_loss_is_summed_over_codebooks():
    model = quantizer(2)
    z, mask = batch()
    output = model(z, mask)
    residual, expected = z[mask], 0
    for k in range(2):
        vectors = model.codebooks[k].codes[output.codes[:, k][mask]]
        expected += (residual - vectors).square().mean()
        residual = residual - vectors
    torch.testing.assert_close(output.loss, expected)


def test_codes_shape_padding_and_decode():
    model = quantizer(3).eval()
    z, mask = batch()
    output = model(z, mask)
    assert output.codes.shape == (3, 3, 10)
    assert (output.codes.transpose(1, 2)[~mask] == NO_CODE).all()
    assert torch.equal(model.encode(z, mask), output.codes)
    torch.testing.assert_close(model.decode(output.codes), output.quantized)
    assert (output.quantized[~mask] == 0).all()


def test_masked_batch_notes_what_single_utterances_note():
    together, alone = quantizer(2), quantizer(2)
    z, mask = batch()
    output = together(z + 100 * ~mask[..., None], mask)
    together.update()
    losses = []
    for b in range(3):
        length = int(mask[b].sum())
        single = alone(z[b : b + 1, :length], torch.ones(1, length, dtype=torch.bool))
        assert torch.equal(single.codes[0], output.codes[b, :, :length])
        losses.append(single.loss * length)
    alone.update()  # one update for all: as with gradient accumulation
    torch.testing.assert_close(sum(losses) / mask.sum(), output.loss)
    for name, value in together.state_dict().items():
        torch.testing.assert_close(alone.state_dict()[name], value, rtol=1e-8, atol=1e-8)


def test_no_valid_frame_means_no_update_and_zero_loss():
    model = quantizer(2, revive_below=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    z, mask = batch()
    output = model(z.requires_grad_(), torch.zeros_like(mask))
    output.loss.backward()
    model.update()
    model.update()
    assert output.loss == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation_notes_nothing():
    model = quantizer().eval()
    before = model.codebooks[0].codes.clone()
    model(*batch())
    model.update()
    assert torch.equal(model.codebooks[0].codes, before)


def test_unused_codes_explode_as_published_unless_revived():
    published, revived = quantizer(), quantizer(revive_below=0.01)
    for model in (published, revived):
        model.codebooks[0].codes[3:] += 50  # far from every frame
        model.codebooks[0].sums.copy_(model.codebooks[0].codes)
        model(*batch())
        model.update()
    unused = slice(3, None)
    assert published.codebooks[0].codes[unused].abs().max() > 1e3
    codebook = revived.codebooks[0]
    frames = batch()[0][batch()[1]]
    for v in range(3, 12):
        assert (frames == codebook.codes[v]).all(1).any(), "a revived code lies on a frame of the batch"
    assert (codebook.counts[unused] > 0.01).all()
    torch.testing.assert_close(codebook.sums, codebook.codes * codebook.counts[:, None], rtol=1e-3, atol=1e-3)


def test_start_places_codes_by_kmeans_and_keeps_them_there():
    model = quantizer(2)
    torch.manual_seed(1)
    z = torch.randn(400, 4, dtype=torch.float64)
    model.start(z, seed=0)
    expected = torch.from_numpy(fit_centroids(z.numpy(), 12, 0)).double()
    torch.testing.assert_close(model.codebooks[0].codes, expected)
    assert (
        model(z[None], torch.ones(1, 400, dtype=torch.bool)).loss
        < quantizer(2)(z[None], torch.ones(1, 400).bool()).loss
    )
    before = model.codebooks[0].codes.clone()
    model.update()  # k-means has converged: the mean of a code's frames is the code
    torch.testing.assert_close(model.codebooks[0].codes, before, rtol=0.05, atol=0.05)


def test_frame_that_is_not_finite_does_not_reach_the_codebook():
    model = quantizer(revive_below=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    z, mask = batch()
    z[0, 3, 1] = float("inf")
    model(z, mask)
    model.update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_large_sums_move_a_codebook_of_half_precision():
    book = EMACodebook(64, 32, decay=0.5, revive_below=0).half()
    frames = torch.full((64, 32), 50.0, dtype=torch.float16)  # each sum is finite, their sum is not
    book.note(frames, torch.arange(64))
    book.update()
    assert torch.equal(book.counts, torch.full((64,), 0.5, dtype=torch.float16))


def test_start_with_fewer_points_than_codes_leaves_no_code_at_the_origin():
    model = quantizer(size=12)
    z = (torch.arange(5.0).double() + 1).repeat(8)[:, None].expand(-1, 4)
    model.start(z, seed=0)
    model(z[None], torch.ones(1, 40, dtype=torch.bool))
    model.update()
    assert model.codebooks[0].codes.norm(dim=1).min() > 1


def test_statistics_and_loss_are_float32_under_mixed_precision():
    torch.manual_seed(0)
    model = EMAQuantizer(4, 12)
    z, mask = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(z.bfloat16(), mask)
        model.update()
    assert output.loss.dtype == torch.float32
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    exact = EMAQuantizer(4, 12)
    exact.load_state_dict(quantizer().float().state_dict())
    expected = exact(z.bfloat16().float(), mask)
    torch.testing.assert_close(output.loss, expected.loss)
    assert torch.equal(output.codes, expected.codes)


def _rank(rank, port_file, results, options):
    from datetime import timedelta

    store = f"file://{port_file}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(minutes=1))
    model = quantizer(2, **options)
    for step in range(5):
        z, mask = batch(step)
        # Rank 0 holds one utterance of three; in step 2 rank 1 has no valid frame at all.
        mine = slice(0, 1) if rank == 0 else slice(1, 3)
        mask = mask & (step != 2) if rank == 1 else mask
        model(z[mine], mask[mine])
        model.update()
    model.start(batch(9)[0].flatten(0, 1) if rank == 0 else z[:0, 0], seed=0)
    torch.save(model.state_dict(), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def two_ranks_equal_one(tmp_path, **options):
    mp.spawn(_rank, (tmp_path / "store", str(tmp_path), options), nprocs=2)
    one = quantizer(2, **options)
    for step in range(5):
        z, mask = batch(step)
        if step == 2:
            mask[1:] = False
        one(z, mask)
        one.update()
    one.start(batch(9)[0].flatten(0, 1), seed=0)
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(value, one.state_dict()[name], rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    two_ranks_equal_one(tmp_path, decay=0.8)


def test_two_processes_revive_the_same_codes_as_one(tmp_path):
    two_ranks_equal_one(tmp_path, decay=0.8, revive_below=0.4)
