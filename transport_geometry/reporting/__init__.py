"""What a person reads: sentences, tables, pictures and pages."""
