"""What is kept between steps: policies, cells, contents, sessions."""
