"""Compares counts of the dataset with the published ones. Nothing is ever made to fit them."""

from kohaku_delta.params import PublishedDataset

NOT_COMPARED = "not compared: this recipe has no published figures"


def compare_counts(figures: dict, published: PublishedDataset | None) -> dict | str:
    """Published and rebuilt numbers of posts and steps, and how many of the published buckets hold the same number of
    images.
    """
    if published is None:
        return NOT_COMPARED
    here = {(width, height): count for width, height, count in figures["buckets"]}
    equal = [here.get((width, height)) == count for width, height, count in published.buckets]
    return {
        "posts": {
            "published": published.posts,
            "rebuilt": figures["trained"],
            "difference": figures["trained"] - published.posts,
        },
        "steps": {
            "published": published.steps,
            "rebuilt": figures["steps"],
            "difference": figures["steps"] - published.steps,
        },
        "buckets": {"published": len(equal), "equal": sum(equal)},
    }


def comparison_sentence(comparison: dict | str) -> str:
    """The comparison in one line."""
    if isinstance(comparison, str):
        return comparison
    posts, steps, buckets = (comparison[name] for name in ("posts", "steps", "buckets"))
    return (
        f"published {posts['published']:,} posts (here {posts['difference']:+,}), "
        f"{steps['published']:,} steps (here {steps['difference']:+,}), "
        f"{buckets['equal']} of {buckets['published']} known buckets equal"
    )
