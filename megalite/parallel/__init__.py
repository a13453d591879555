"""What is spread over processes, and how."""
