from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from torch.utils.data import DataLoader, Dataset

from repcodec.errors import RepCodecError, user_message

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
