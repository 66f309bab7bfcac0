"""Small real tasks shared by the demo, the studies and the tests."""
