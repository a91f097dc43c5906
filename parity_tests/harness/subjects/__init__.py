"""What is judged: NumPy arrays in, NumPy arrays out. The only files of the harness that touch a framework."""
