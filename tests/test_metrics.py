import math

import pytest
import torch
from sklearn.metrics import mutual_info_score

from repcodec.metrics import CodeUsage, NormalizedError, PhoneAgreement, reconstruction_loss
from repcodec.stacks import frame_mask

LENGTHS = torch.tensor([6, 2, 4])


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 6, 5, dtype=torch.float64, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_loss_is_the_mean_over_valid_frames_only(kind):
    x, y = batch()
    mask = frame_mask(LENGTHS, 6)
    difference = (x - y)[mask]
    expected = difference.abs().mean() if kind == "l1" else difference.square().mean()
    torch.testing.assert_close(reconstruction_loss(x, y, mask, kind), expected)


def test_loss_without_a_valid_frame_is_zero():
    x, y = batch()
    assert reconstruction_loss(x, y, torch.zeros(3, 6, dtype=torch.bool), "l2") == 0


def test_loss_is_float32_for_half_precision_inputs():
    x, y = (t.half() for t in batch())
    assert reconstruction_loss(x, y, frame_mask(LENGTHS, 6), "l2").dtype == torch.float32


def test_normalized_error_over_batches_is_that_of_all_frames():
    mean = torch.tensor([0.5, 0, -1, 2, 0], dtype=torch.float64)
    metric = NormalizedError(mean)
    frames = []
    for seed in range(3):
        x, y = batch(seed)
        mask = frame_mask(LENGTHS, 6)
        metric.update(y, x, mask)
        frames.append((x[mask], y[mask]))
    x, y = (torch.cat(parts) for parts in zip(*frames, strict=True))
    torch.testing.assert_close(metric.compute(), (x - y).square().sum() / (x - mean).square().sum())
    assert "mean" not in metric.state_dict()


def test_usage_of_uniform_codes_has_full_perplexity():
    metric = CodeUsage(2, 8)
    metric.update(torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.int64)])[None])
    values = metric.compute()
    assert values["perplexity"] == pytest.approx((8 + 1) / 2)
    assert values["used_share"] == pytest.approx((1 + 1 / 8) / 2)
    assert values["entropy_bits"] == pytest.approx(3)


def test_usage_is_over_the_whole_set_and_ignores_padding():
    metric = CodeUsage(1, 4)
    metric.update(torch.tensor([[[0, 0, 1, -1]]]))
    metric.update(torch.tensor([[[2, 2, -1, -1]]]))
    assert metric.counts.tolist() == [[2, 1, 2, 0]]
    entropy = -sum(p * math.log(p) for p in (0.4, 0.2, 0.4))
    assert metric.compute()["perplexity"] == pytest.approx(math.exp(entropy))  # not a mean over batches


def test_phone_agreement_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    phones = torch.randint(-1, 6, (2, 500), generator=generator)
    codes = (phones * 3 + torch.randint(0, 7, (2, 500), generator=generator)).clamp(-1, 19)
    metric = PhoneAgreement(6, 20)
    for p, c in zip(phones, codes, strict=True):
        metric.update(p, c)
    known = (phones >= 0) & (codes >= 0)
    p, c = phones[known].numpy(), codes[known].numpy()
    values = metric.compute()
    assert values["pnmi"] == pytest.approx(mutual_info_score(p, c) / mutual_info_score(p, p))
    purity = sum(max((p[c == code] == phone).sum() for phone in range(6)) for code in set(c.tolist())) / len(p)
    assert values["phone_purity"] == pytest.approx(purity)


def test_codes_that_are_phones_have_pnmi_one():
    metric = PhoneAgreement(5, 5)
    metric.update(torch.arange(5).repeat(4), torch.arange(5).repeat(4))
    assert metric.compute()["pnmi"] == pytest.approx(1)
    assert metric.compute()["phone_purity"] == pytest.approx(1)
