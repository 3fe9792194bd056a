import errno
from pathlib import Path

import pytest
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset

from repcodec.errors import RepCodecError, one_sentence, user_message

CONF = Path(__file__).parent.parent / "conf"
SENTENCE = "/data/0_1.npy: the features have width 768, expected 1024; extract them again."


class Failing(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, item):
        try:
            raise OSError("the cause")
        except OSError as error:
            raise RepCodecError(SENTENCE) from error


def test_a_plain_error_shows_its_own_sentence():
    assert user_message(RepCodecError(SENTENCE)) == SENTENCE


def error_of_loading(num_workers):
    try:
        list(DataLoader(Failing(), num_workers=num_workers))
    except RepCodecError as error:
        return error.with_traceback(None)  # lets go of the iterator, which ends its workers
    return None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_data_loader_shows_the_same_sentence_from_a_worker(num_workers):
    error = error_of_loading(num_workers)

    assert ("Traceback" in str(error)) == bool(num_workers)
    assert user_message(error) == SENTENCE


def test_an_error_caused_by_another_shows_the_last_sentence():
    wrapped = (
        "Caught RepCodecError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "repcodec.errors.RepCodecError: the cause\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        f"repcodec.errors.RepCodecError: {SENTENCE}\n"
    )
    assert user_message(RepCodecError(wrapped)) == SENTENCE


def test_a_sentence_of_several_lines_stays_whole():
    wrapped = "Caught RepCodecError in DataLoader worker process 0.\nrepcodec.errors.RepCodecError: first\nsecond\n"
    assert user_message(RepCodecError(wrapped)) == "first\nsecond"


def test_the_error_is_no_bug_class_of_python():
    # Code that catches ValueError or OSError around a library call must not swallow it.
    assert RepCodecError.__bases__ == (Exception,)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.batch_sice=3", "data.batch_sice: the configuration has no such option; did you mean batch_size?"),
        ("encodr=hubert_base", "encodr: the configuration has no such option; did you mean encoder?"),
        ("seed.x=3", "seed.x: the configuration has no such option."),
        ("codec=smal", "codec=smal: there is no such option; codec has published, small, strided"),
        ("trainer.max_steps=1,2", "trainer.max_steps=1,2: several values make a sweep, which needs -m"),
    ],
)
def test_a_wrong_override_is_one_sentence_that_names_it_and_what_there_is(override, sentence):
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(HydraException) as caught:
        compose("train", [override])
    message = user_message(caught.value)
    assert message.startswith(sentence)
    assert "\n" not in message and "search path" not in message


def test_words_of_the_libraries_that_are_the_users_business():
    for name in ("InductorError", "BackendCompilerFailed"):
        error = type(name, (RuntimeError,), {})("no compiler\nand much more")
        assert user_message(error) == (
            "module.compile=true: torch.compile fails (no compiler); train with module.compile=false."
        )
    assert user_message(MisconfigurationException("no GPU here")) == "no GPU here"
    assert "trainer=ddp_cpu" in user_message(MisconfigurationException("No supported gpu backend found!"))
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] /gloo/transport: Connection closed by peer")
    for error in (lost, dist.DistNetworkError("timed out")):
        assert user_message(error).startswith("another process of this run has died or no longer answers")
    assert user_message(OSError(errno.ENOSPC, "No space left on device")).startswith("No space left on device: free")


def test_an_error_of_the_program_itself_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError), one_sentence():
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as stop, one_sentence():
        raise RepCodecError(SENTENCE)
    assert stop.value.code == 1 and capsys.readouterr().err == f"error: {SENTENCE}\n"
