//! How fast a segment is filled, beside the bare loops: no checksums, no header, nothing sealed.
//!
//! ```text
//! cargo bench -p onecopy-core --bench fill [-- MEBIBYTES [ROUNDS]]
//! ```
//! One source, fresh memory each time, the ways in turn; GB/s, and each round's ratio to the fastest bare loop.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use onecopy_core::segment::writer::Outline;
use onecopy_core::sys::directory::Directory;
use onecopy_core::sys::huge::{self, Window};
use onecopy_core::sys::object::create_memfd;
use onecopy_core::words::{Backend, Huge};

const NAME: &str = "onecopy-bench";
/// Fills something with the source, and lets go of it.
type Way = fn(&[u8]);

const WAYS: [(&str, Way); 5] = [
    ("write(2), 1 MiB a call", plain),
    ("write(2), then MADV_COLLAPSE", collapsed_after),
    ("memcpy, huge pages first", huge_first),
    ("a segment, huge=\"never\"", |source| segment(source, Huge::Never)),
    ("a segment, huge=\"auto\"", |source| segment(source, Huge::Auto)),
];
const BARE: usize = 3;

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let (mebibytes, rounds) = (*numbers.first().unwrap_or(&1024), *numbers.get(1).unwrap_or(&9));
    let source: Vec<u8> = (0..mebibytes << 20).map(|at| (at >> 12) as u8).collect();
    println!("{mebibytes} MiB, {rounds} rounds, huge pages: {:?}", huge::available());
    let mut seconds = vec![Vec::new(); WAYS.len()];
    for round in 0..rounds {
        // Each comes after each: what one leaves behind (huge pages or small ones) is what the next one finds.
        for place in 0..WAYS.len() {
            let way = (place * (1 + round % (WAYS.len() - 1)) + round) % WAYS.len();
            let began = Instant::now();
            WAYS[way].1(&source);
            seconds[way].push(began.elapsed().as_secs_f64());
        }
    }
    println!("{:32} {:>12} {:>12} {:>30}", "", "GB/s median", "best", "of the fastest bare loop");
    for (way, own) in WAYS.iter().zip(&seconds) {
        let best_bare = |round: usize| seconds[..BARE].iter().map(|bare| bare[round]).fold(f64::MAX, f64::min);
        let mut ratios: Vec<f64> = (0..rounds).map(|round| best_bare(round) / own[round]).collect();
        let mut speeds: Vec<f64> = own.iter().map(|seconds| source.len() as f64 / 1e9 / seconds).collect();
        ratios.sort_by(f64::total_cmp);
        speeds.sort_by(f64::total_cmp);
        let middle = rounds / 2;
        println!(
            "{:32} {:>12.2} {:>12.2} {:>14.2} ({:.2} to {:.2})",
            way.0,
            speeds[middle],
            speeds[rounds - 1],
            ratios[middle],
            ratios[rounds / 4],
            ratios[rounds * 3 / 4]
        );
    }
}

fn fresh(bytes: usize) -> OwnedFd {
    create_memfd(NAME, bytes as u64).unwrap()
}

fn plain(source: &[u8]) {
    written(source);
}

fn written(source: &[u8]) -> OwnedFd {
    let file = File::from(fresh(source.len()));
    for (index, part) in source.chunks(1 << 20).enumerate() {
        file.write_all_at(part, (index << 20) as u64).unwrap();
    }
    file.into()
}

fn collapsed_after(source: &[u8]) {
    let fd = written(source);
    let mut next = Some(0);
    while let Some(from) = next {
        next = huge::collapse_step(&fd, source.len(), Huge::Auto, from);
    }
}

fn huge_first(source: &[u8]) {
    let fd = fresh(source.len());
    match Window::open(&fd, source.len(), Huge::Auto) {
        Some(mut window) => window.write(&fd, 0, source).unwrap(),
        None => plain(source),
    }
}

fn segment(source: &[u8], huge: Huge) {
    let directory = Directory::open(Path::new("/dev/shm")).unwrap();
    let bytes = source.len() as u64;
    let outline = Outline::new(0, &[(0, bytes)], bytes).unwrap();
    let mut filling = outline.reserve(Backend::Memfd, huge, &directory, NAME, b"").unwrap();
    filling.fill(source).unwrap();
    filling.seal().unwrap();
}
