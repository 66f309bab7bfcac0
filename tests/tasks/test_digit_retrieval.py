import numpy as np
import pytest
from sklearn.decomposition import PCA

from polyreward.errors import InvalidInputError
from polyreward.tasks.digit_retrieval import DigitRetrieval, digit_features, split


def test_pools_hold_two_to_nine_relevant_documents():
    task = DigitRetrieval(split(0)[1])
    pools = task.pools(300, 40, np.random.default_rng(0))
    assert pools.signal.shape == pools.relevant.shape == pools.similarity.shape == (300, 40)
    assert pools.teachers.shape == (2, 300, 40)
    counts = pools.relevant.sum(axis=1)
    assert set(counts.tolist()) == set(range(2, 10))
    assert pools.relevant.mean(axis=0).max() < 0.25  # in random order


def test_the_map_keeps_the_order_inside_a_pool():
    pools = DigitRetrieval(split(0)[0]).pools(50, 40, np.random.default_rng(1))
    assert (np.argsort(pools.signal, axis=1) == np.argsort(pools.similarity, axis=1)).all()
    fit = [np.polyfit(s, x, 1) for s, x in zip(pools.similarity, pools.signal, strict=True)]
    stretch, shift = np.array(fit).T
    assert (stretch > 0).all()
    assert np.std(shift) == pytest.approx(1, abs=0.3)
    assert np.std(np.log(stretch)) == pytest.approx(0.6, abs=0.2)
    plain = DigitRetrieval(split(0)[0], shift=0, stretch=0).pools(5, 40, np.random.default_rng(1))
    np.testing.assert_allclose(plain.signal, plain.similarity)


def test_features_are_the_principal_components_of_scikit_learn():
    from sklearn.datasets import load_digits

    features, classes = digit_features()
    data = load_digits()
    expected = PCA(16, svd_solver="full").fit_transform(data.data)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(features @ features[:20].T, expected @ expected[:20].T, atol=1e-8)
    assert (classes == data.target).all()


def test_relevant_documents_have_the_class_of_the_query_and_none_is_the_query():
    task = DigitRetrieval(split(3)[1], noise=0, teacher_noise=0)
    pools = task.pools(400, 40, np.random.default_rng(2))
    assert pools.similarity.max() < 1 - 1e-9  # the query itself would have cosine 1
    assert (pools.teachers == pools.relevant).all()
    assert pools.similarity[pools.relevant].mean() > pools.similarity[~pools.relevant].mean() + 0.4


def test_no_document_twice():
    pools = DigitRetrieval(split(3)[1], noise=0).pools(200, 40, np.random.default_rng(2))
    assert all(len(set(row.tolist())) == 40 for row in pools.similarity)


def test_images_are_split_by_seed_without_overlap():
    train, test = split(5)
    assert len(train) == 1200
    assert sorted([*train, *test]) == list(range(1797))
    assert split(6)[0].tolist() != train.tolist()


def test_same_generator_same_pools():
    draws = [DigitRetrieval(split(0)[0]).pools(3, 40, np.random.default_rng(4)).signal for _ in range(2)]
    assert (draws[0] == draws[1]).all()


@pytest.mark.parametrize("size", [8, 1200])
def test_sizes_that_do_not_fit(size):
    with pytest.raises(InvalidInputError, match=f"got size {size}"):
        DigitRetrieval(split(0)[0]).pools(1, size, np.random.default_rng(0))
