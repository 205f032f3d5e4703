def token_cases(loaded, text_ids):
    return []
def probability_cases(loaded, text_ids):
    return []
