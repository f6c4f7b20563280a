//! The root by which an opening begins to write.

use sheave_core::Result;

use super::{Claim, Fold};
use crate::format::{LastOpening, Root, State, keys};
use crate::journal::Adopted;
use crate::retry::{Requests, Settled};

/// Makes the open root. `None` if another opener has claimed the volume since.
///
/// It takes the proof that the journal is adopted: after a crash behind this point the journal is
/// recognised as the one of this opening.
///
/// # Errors
/// Those of the store.
pub(crate) async fn enter(
    requests: &Requests,
    claim: &Claim,
    fold: &Fold,
    adopted: &Adopted,
) -> Result<Option<Root>> {
    let author = claim.opening();
    assert_eq!(adopted.opening(), author, "the journal is adopted by this opening");
    let node = claim.node().to_owned();
    let first = fold.committed().seq.next();
    // A checkpoint that was found in the log has all that the root before it knew.
    let snapshots = &claim.root().snapshots;
    let snapshots = match fold.directory == claim.root().directory {
        true => snapshots.clone(),
        false => snapshots.behind_checkpoint(),
    };
    let root = Root {
        number: claim.root().number + 1,
        state: State::Open,
        author,
        node: node.clone(),
        committed: fold.committed(),
        last: LastOpening { opening: author, node, first, is_closed: false },
        previous: fold.newest_reach(),
        directory: fold.directory,
        snapshots,
        ..claim.root().clone()
    };
    let settled = requests.create(&keys::root(root.number), root.encode().into()).await?;
    Ok((settled == Settled::Mine).then_some(root))
}
