import pytest

from data.subsets import check_holdout, first_of_each, split

NAMES = ("ant", "bee")


def test_first_of_each_class_in_their_order():
    assert first_of_each([1, 0, 1, 1, 0, 0], 2).tolist() == [0, 1, 2, 4]
    assert first_of_each([1, 0, 1], None).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("holdout", "held"), [(1, [4, 6]), (2, [2, 4, 5, 6]), (0.5, [2, 4, 5, 6]), (0.01, [4, 6]), (0.6, [2, 4, 5, 6])]
)
def test_the_last_images_of_each_class_are_held_out(holdout, held):
    labels = [0, 0, 0, 1, 0, 1, 1]
    trained, found = split(labels, holdout, NAMES)
    assert found.tolist() == held
    assert trained.tolist() == sorted(set(range(7)) - set(held))


def test_a_class_that_would_have_nothing_left_is_named():
    with pytest.raises(ValueError, match=r"data.holdout=3 leaves no training image in 1 class\(es\): bee \(3\)"):
        split([0, 0, 0, 0, 1, 1, 1], 3, NAMES)


@pytest.mark.parametrize("holdout", [-1, 1.5, 1.0, True, "many", 2.0])
def test_what_is_no_number_or_share_is_refused(holdout):
    with pytest.raises(ValueError, match="expected a whole number of images of each class, a share"):
        check_holdout(holdout)


def test_nothing_held_out():
    assert check_holdout(None) is None
    assert check_holdout(0) is None
