"""The split is a function of names, with both sides filled."""

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.split import hash_share, held_out

names_strategy = st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=60, unique=True)


@given(names_strategy, st.floats(0.001, 1))
@settings(max_examples=150, deadline=None)
def test_both_sides_have_one_and_at_most_one_name_is_moved(names, fraction):
    mask = held_out(names, fraction)
    assert 0 < mask.sum() < len(names)
    by_threshold = [hash_share(name) < fraction for name in names]
    assert sum(a != b for a, b in zip(mask, by_threshold, strict=True)) <= 1


@given(names_strategy, st.floats(0, 1), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_names_does_not_matter(names, fraction, random):
    side = dict(zip(names, held_out(names, fraction), strict=True))
    shuffled = random.sample(names, len(names))
    assert dict(zip(shuffled, held_out(shuffled, fraction), strict=True)) == side


def test_share_is_about_the_fraction_and_zero_holds_nothing_out():
    names = [f"file{i}.py" for i in range(5000)]
    assert abs(held_out(names, 0.05).mean() - 0.05) < 0.01
    assert not held_out(names, 0.0).any()
    assert not held_out(["only"], 0.0001).any()


def test_shares_are_the_same_on_every_machine():
    assert hash_share("os.py") == 0.943812766417913  # pinned: a change would move documents across the split
