"""`fastssl doctor`: facts about a machine are gathered in one place, and judged by pure functions in another."""
