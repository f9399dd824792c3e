from phase1.tables.grid import grid


def test_columns_are_as_wide_as_their_widest_cell_and_end_flush_where_asked():
    text = grid(("name", "n"), [("a", "1"), ("long one", "1,234")], [False, True])
    assert text.splitlines() == ["name          n", "--------  -----", "a             1", "long one  1,234"]


def test_cells_of_several_lines_stand_side_by_side():
    text = grid(("a", "b\nc"), [("x\ny", "1"), ("", "2")], [False, True])
    assert text.splitlines() == ["a  b", "   c", "-  -", "x  1", "y", "   2"]


def test_a_table_without_rows_is_its_headings():
    assert grid(("a", "b"), [], [False, True]) == "a  b\n-  -"
