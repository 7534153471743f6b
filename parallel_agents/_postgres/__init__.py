"""What ``PostgresStore`` is made of: tables and functions, connections, the session that keeps them, wake-up calls."""
