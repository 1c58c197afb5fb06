"""What was pushed last is popped first, and only what was reached is kept."""

import numpy as np

from nvae.codec.stack import STATE_WORDS, Stack, library

MODEL = library().model.QuantizedGaussian(-1000, 1000)
MEAN, SIGMA = np.linspace(-3, 3, 200), np.geomspace(0.5, 50, 200)


def test_pushing_undoes_popping() -> None:
    stack = Stack.new("0", words=200)
    before = stack.words()
    popped = stack.pop(MODEL, MEAN, SIGMA)
    stack.push(popped, MODEL, MEAN, SIGMA)
    np.testing.assert_array_equal(stack.words()[-STATE_WORDS:], before)


def test_what_is_kept_goes_on_where_it_was() -> None:
    stack = Stack.new("0", words=200)
    drawn = stack.pop(MODEL, MEAN, SIGMA)
    stack.push(np.arange(200) % 7, MODEL, MEAN, SIGMA)
    again = Stack(stack.words(), is_new=False)
    np.testing.assert_array_equal(again.pop(MODEL, MEAN, SIGMA), np.arange(200) % 7)
    again.push(drawn, MODEL, MEAN, SIGMA)


def test_random_words_that_nothing_reached_are_not_kept() -> None:
    stack = Stack.new("0", words=10_000)
    stack.pop(MODEL, MEAN, SIGMA)
    assert 0 < stack.begun < 200
    assert len(stack.words()) == STATE_WORDS


def test_what_is_popped_from_random_words_is_drawn_from_the_model() -> None:
    stack = Stack.new("0", words=10_000)
    drawn = stack.pop(MODEL, np.full(5000, 3.0), np.full(5000, 20.0))
    assert abs(drawn.mean() - 3) < 1
    assert abs(drawn.std() - 20) < 1
