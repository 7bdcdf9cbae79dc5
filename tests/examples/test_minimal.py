def test_minimal_says_what_happened(start):
    with start("minimal.py") as example:
        output = example.process.communicate()[0]
        assert example.process.returncode == 0
        example.assert_no_children()
    assert "the reader says 499,999,500,000" in output
    assert "the bytes are free again" in output
