import pytest

from polyreward.errors import InvalidInputError
from polyreward.rewards.formats import RegexFormat, TagFormat


@pytest.mark.parametrize(
    ("text", "strict", "loose", "graded"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1, 1),
        (" <think>a</think>\n<answer>b</answer>\n", 1, 1, 1),
        ("x <think>a</think><answer>b</answer>", 0, 1, 0.5),
        ("<think>a</think>x<answer>b</answer>", 0, 1, 0.5),
        ("<think>a</think><answer>b</answer> x", 0, 1, 0.5),
        ("<answer>b</answer><think>a</think>", 0, 0, 0.5),
        ("<think>a<answer>b</answer></think>", 0, 0, 0.5),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 0, 0.25),
        ("<think>a</think>", 0, 0, 0.25),
        ("<answer>b", 0, 0, 0),
        ("</think><think><answer></answer>", 0, 0, 0.5),
        ("", 0, 0, 0),
    ],
)
def test_tags(text, strict, loose, graded):
    assert TagFormat()(None, [text]) == [strict]
    assert TagFormat(outside=True)(None, [text]) == [loose]
    assert TagFormat(graded=True)(None, [text]) == [graded]


def test_one_tag_and_lists_from_a_recipe():
    assert TagFormat(["answer"])(None, ["<answer>1</answer>", "<think></think><answer>1</answer>"]) == [1, 0]
    for tags in ((), ("a", "a")):
        with pytest.raises(InvalidInputError):
            TagFormat(tags)


def test_regex_matches_the_whole_text_across_lines():
    assert RegexFormat(r"\d+.*done")(None, ["12\nis done", "x 12 done", "12 done."]) == [1, 0, 0]
    assert RegexFormat(r"\d+.*done", part=True)(None, ["x 12 done."]) == [1]
    with pytest.raises(InvalidInputError, match="no regular expression"):
        RegexFormat("(")
