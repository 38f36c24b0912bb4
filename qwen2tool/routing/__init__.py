"""Which implementation runs where. Today: which attention backends the reference path may use."""
