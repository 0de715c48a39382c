"""The axis grammar: what is the same expression, what is refused and with which words."""

from __future__ import annotations

import pytest

from transfuse.spaces.axes import UNMOVED, Axes, Axis, AxisError, Part, parse_axes

EQUIVALENT = [
    ("mlp <- stream", " mlp<-stream "),
    ("a, b, c", "a,b ,  c"),
    ("a | b <- c", "(a | b) <- (c)"),
    ("(a|b|c) <- d", "a | b | c <- d"),
    ("heads/qk* <- stream", "(heads/qk*)<-stream"),
    ("_, _, stream", "(_), (_), (stream)"),
    ("stream <- _, _, _", "stream <- (_) , _, _"),
    ("-", "  -  "),
]

SAME_DIMS = [  # an input axis is an output axis that takes the dual; only the bias sees the difference
    ("mlp <- stream", "mlp, stream*"),
    ("stream -> mlp", "stream*, mlp"),
    ("a <- b*", "a, b"),
    ("a <- b | c*", "a, b* | c"),
    ("a <- _", "a, _"),
    ("a, b <- c, d", "a, b, c*, d*"),
    ("c, d -> a, b", "c*, d*, a, b"),
]

MALFORMED = [
    ("", "'': an empty axis or part"),
    ("a, , b", "'a, , b': an empty axis or part"),
    ("a | ", "'a |': an empty axis or part"),
    ("a <- ", "'a <-': an empty axis or part"),
    ("-> a", "'-> a': an empty axis or part"),
    ("()", "'()': an empty axis or part"),
    ("a <- b <- c", "'a <- b <- c': more than one arrow"),
    ("a -> b <- c", "'a -> b <- c': more than one arrow"),
    ("(a | b", "'(a | b': unbalanced parentheses in '(a | b'"),
    ("x, a | b) <- c", "'x, a | b) <- c': unbalanced parentheses in 'a | b)'"),
    ("_ | a | _", "'_ | a | _': two unmoved parts in '_ | a | _', whose lengths could not be told apart"),
    ("3stream", "'3stream': '3stream' is not the name of a space"),
    ("a b", "'a b': 'a b' is not the name of a space"),
    ("heads//qk", "'heads//qk': 'heads//qk' is not the name of a space"),
    ("heads/", "'heads/': 'heads/' is not the name of a space"),
    ("/qk", "'/qk': '/qk' is not the name of a space"),
    ("a**", "'a**': 'a*' is not the name of a space"),
    ("*", "'*': '' is not the name of a space"),
    ("_*", "'_*': '_' is not the name of a space"),
    ("a, -", "'a, -': '-' is not the name of a space"),
    ("a + b", "'a + b': 'a + b' is not the name of a space"),
]


@pytest.mark.parametrize(("one", "other"), EQUIVALENT)
def test_equivalent_expressions(one: str, other: str):
    assert parse_axes(one) == parse_axes(other)


@pytest.mark.parametrize(("one", "other"), SAME_DIMS)
def test_an_input_axis_takes_the_dual(one: str, other: str):
    first, second = parse_axes(one), parse_axes(other)
    assert first.dims == second.dims
    assert first.inputs and not second.inputs


@pytest.mark.parametrize(("text", "message"), MALFORMED)
def test_malformed_expressions(text: str, message: str):
    with pytest.raises(AxisError) as error:
        parse_axes(text)
    assert str(error.value) == message


def test_expression():
    axes = parse_axes("heads.0/qk.0 | heads.0/qk.0* | _ <- stream.{in}")
    parts = (Part("heads.0/qk.0"), Part("heads.0/qk.0", dual=True), Part(None))
    assert axes == Axes((Axis(parts), Axis((Part("stream.{in}", dual=True),))), frozenset({1}))
    assert axes.spaces == {"heads.0/qk.0", "stream.{in}"}


def test_inputs_come_first_behind_the_other_arrow():
    assert parse_axes("a, b -> c").inputs == {0, 1}
    assert parse_axes("c <- a, b").inputs == {1, 2}


@pytest.mark.parametrize(
    ("text", "bias"),
    [
        ("mlp <- stream", "mlp"),
        ("stream -> mlp", "mlp"),
        ("a | b* <- c, d", "a | b*"),
        ("_ <- stream", "_"),
        ("stream", "stream"),
        ("-", "-"),
    ],
)
def test_a_bias_has_the_output_axes(text: str, bias: str):
    assert parse_axes(text).outputs_only() == parse_axes(bias)


def test_rename_keeps_everything_else():
    assert parse_axes("a.0 | a.0* | _ <- b").rename(lambda s: s.replace("a.0", "z")) == parse_axes("z | z* | _ <- b")
    assert UNMOVED.rename(str.upper) is UNMOVED
    assert UNMOVED.spaces == frozenset()


def only_axis(text: str) -> Axis:
    dims = parse_axes(text).dims
    assert dims is not None and len(dims) == 1
    return dims[0]


@pytest.mark.parametrize(
    ("text", "length", "lengths"),
    [
        ("a", 3, (3,)),
        ("a | b", 5, (3, 2)),
        ("a | _", 5, (3, 2)),
        ("_ | b", 2, (0, 2)),
        ("a | unknown", 7, (3, 4)),
        ("a | a* | b", 8, (3, 3, 2)),
        ("unknown", 9, (9,)),
    ],
)
def test_sizes_of_parts(text: str, length: int, lengths: tuple[int, ...]):
    assert only_axis(text).sizes(length, {"a": 3, "b": 2}) == lengths


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        ("a", 4, r"an axis of length 4 cannot be split as \[3\]"),
        ("a | b", 6, r"an axis of length 6 cannot be split as \[3, 2\]"),
        ("a | _", 2, r"an axis of length 2 cannot be split as \[3, None\]"),
        ("unknown | _", 4, r"an axis of length 4 cannot be split as \[None, None\]"),
    ],
)
def test_sizes_that_do_not_fit(text: str, length: int, message: str):
    with pytest.raises(AxisError, match=message):
        only_axis(text).sizes(length, {"a": 3, "b": 2})


def test_rank_is_checked():
    parse_axes("a <- b").check_rank((3, 4))
    UNMOVED.check_rank((1, 2, 3))
    UNMOVED.check_rank(())
    with pytest.raises(AxisError, match=r"expected 2 dimensions, the shape is \(3,\)"):
        parse_axes("a <- b").check_rank((3,))
