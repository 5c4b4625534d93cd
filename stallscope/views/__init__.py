"""What a face needs, computed once: terminals, pages and files only draw what these functions return."""
