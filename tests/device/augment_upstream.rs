//! Augmentation against batchgeneratorsv2's own results with the same parameters; `tests/data/make/make_augmentation_fixtures.py`
//! wrote them.

use crate::common::{assert_close, data, device, npz, read};
use ndarray::{ArrayD, Axis};
use voxgrad::augment::Draw;
use voxgrad::kernels::augment::{self, LabelRule, Movement, Patch, Region, Sample};
use voxgrad::kernels::{Buffer, Context, Dtype};

fn array(name: &str) -> ArrayD<f64> {
    npz::read(&data("augment/upstream.npz"), name)
}

/// Channels-last values of an array `[channels, depth, height, width]`, and its extents.
fn channels_last(array: &ArrayD<f64>) -> ([usize; 3], Vec<f64>) {
    let shape = array.shape();
    let values = array.view().permuted_axes(ndarray::IxDyn(&[1, 2, 3, 0])).iter().copied().collect();
    ([shape[1], shape[2], shape[3]], values)
}

/// The image that all results are of.
fn image(context: &Context) -> (Patch, Buffer) {
    let array = array("image");
    let (dims, values) = channels_last(&array);
    let patch = Patch::new(dims, array.len_of(Axis(0))).unwrap();
    (patch, context.upload_f32(&values.iter().map(|&v| v as f32).collect::<Vec<_>>()).unwrap())
}

fn check_spatial(context: &Context, draw: &Draw, rule: LabelRule, image_name: Option<&str>, labels_name: &str) {
    let (source, image) = image(context);
    let codes: Vec<u8> = array("labels").iter().map(|label| (label + 1.0) as u8).collect();
    let codes = context.upload(&codes, Dtype::U8).unwrap();
    let expected = array(labels_name);
    let patch = Patch::new(channels_last(&expected).0, source.channels()).unwrap();
    let out = context.empty(patch.elements(), Dtype::F32).unwrap();
    let labels = context.empty(patch.voxels(), Dtype::U8).unwrap();
    let sample = Sample { patch: source, image: &image, labels: &codes, index: 0 };
    let movement = Movement { matrix: draw.matrix().unwrap(), region: Region::whole(source.dims()), rule };
    augment::spatial(context, &sample, &movement, &patch, &out, &labels).unwrap();
    if let Some(name) = image_name {
        assert_close(name, &read(context, &out), &channels_last(&array(name)).1, 2e-6);
    }
    let got = context.download::<u8>(&labels).unwrap();
    let different = got.iter().zip(&expected).filter(|(code, label)| f64::from(**code) - 1.0 != **label).count();
    // Where two labels have all but the same weight, rounding decides.
    assert!(different * 200 <= got.len(), "{labels_name}: {different} of {} labels differ", got.len());
}

#[test]
fn rotation_and_scaling_agree() {
    let (context, _guard) = device();
    let draw = Draw { angles: Some([0.35, -0.2, 0.5]), scale: Some(0.8), ..Draw::default() };
    check_spatial(context, &draw, LabelRule::Vote, Some("spatial_image"), "spatial_labels");
    check_spatial(context, &draw, LabelRule::Nearest, None, "nearest_labels");
    let plane = Draw { angles: Some([2.0, 0.0, 0.0]), scale: Some(1.35), in_plane: true, ..Draw::default() };
    check_spatial(context, &plane, LabelRule::Vote, Some("plane_image"), "plane_labels");
}

#[test]
fn blur_and_low_resolution_agree() {
    let (context, _guard) = device();
    let (patch, mut image) = image(context);
    let mut other = context.empty(patch.elements(), Dtype::F32).unwrap();
    augment::low_resolution(context, &patch, &image, &other, &[Some([8, 10, 8]), Some([12, 15, 13])]).unwrap();
    assert_close("low_resolution", &read(context, &other), &channels_last(&array("low_resolution")).1, 2e-6);
    for (axis, sigmas) in [[0.5, 0.93], [0.75, 0.6], [1.0, 0.8]].iter().enumerate() {
        let taps: Vec<Vec<f32>> = sigmas.iter().map(|&sigma| augment::gaussian_taps(sigma)).collect();
        augment::blur(context, &patch, &image, &other, axis, &taps).unwrap();
        std::mem::swap(&mut image, &mut other);
    }
    assert_close("blur", &read(context, &image), &channels_last(&array("blur")).1, 1e-6);
}

#[test]
fn intensities_agree() {
    let (context, _guard) = device();
    let check = |name: &str, change: &dyn Fn(&Patch, &Buffer)| {
        let (patch, image) = image(context);
        change(&patch, &image);
        assert_close(name, &read(context, &image), &channels_last(&array(name)).1, 2e-6);
    };
    check("brightness", &|patch, image| augment::brightness(context, patch, image, &[0.8, 1.2]).unwrap());
    check("contrast", &|patch, image| augment::contrast(context, patch, image, &[1.2, 0.8]).unwrap());
    check("gamma", &|patch, image| augment::gamma(context, patch, image, &[0.75, 1.4], false).unwrap());
    check("gamma_inverted", &|patch, image| augment::gamma(context, patch, image, &[0.75, 1.4], true).unwrap());
}
